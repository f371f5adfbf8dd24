// The page: where its data comes from (a stream, or the report's own), and all that is not a picture.
"use strict";
(() => {
  const { el, svg, text, number, count, bytes, rate, duration, percent, metric, clock, known, cut } = Shown;
  const $ = (id) => document.getElementById(id);
  const LINES = 2000, EVENTS = 1000, BESIDE = 5, SILENT_MS = 6000, RETRY_MS = [500, 1000, 2000, 4000];
  const embedded = $("data");
  let status = null, curves = null, lines = [], events = new Map(), others = new Map(), ended = "", seen = 0, diagnosis = null;

  // ---------------------------------------------------------------- curves

  function take(part) {
    if (!curves || part.changed !== curves.changed || (part.from === 0 && part.evals_from === 0)) {
      if (part.from || part.evals_from) return false;
      curves = { ...part };
    } else {
      if (part.from > curves.step.length || part.evals_from > curves.eval_step.length) return false;
      for (const name of ["step", "seconds", "loss", "low", "high", "samples", "late"]) {
        curves[name].splice(part.from, Infinity, ...part[name]);
      }
      for (const name of ["eval_step", "eval_seconds"]) curves[name].splice(part.evals_from, Infinity, ...part[name]);
      for (const [name, column] of Object.entries(part.evals)) {
        if (!curves.evals[name]) curves.evals[name] = Array(part.evals_from).fill(null);
        curves.evals[name].splice(part.evals_from, Infinity, ...column);
      }
    }
    chooseMetric();
    Charts.set(curves);
    return true;
  }
  function chooseMetric() {
    const names = Object.keys(curves.evals).filter((name) => name !== "loss");
    const list = $("metric");
    if ([...list.options].map((option) => option.value).join("\n") !== names.join("\n")) {
      list.replaceChildren(...names.map((name) => el("option", { value: name }, cut(name, 40))));
      if (!names.includes(Charts.view.metric)) {
        Charts.view.metric = names.includes("accuracy") ? "accuracy" : names[0] || "";
        list.value = Charts.view.metric;
        Charts.draw();
      }
    }
    list.closest("label").hidden = names.length < 2;
  }

  // ---------------------------------------------------------------- the status

  // A run that is over: who stayed to the end is not drawn as lost.
  function afterwards(next) {
    const early = new Set(next.events.filter((e) => e.kind === "gone" && e.step < next.step).map((e) => e.machine));
    const machines = next.machines.map((m) => (m.state === "gone" && !early.has(m.id) ? { ...m, state: "idle", trouble: "stayed to the end" } : m));
    return { ...next, machines };
  }
  function show(next) {
    status = next.end ? afterwards(next) : next;
    const place = status.runs > 1 ? ` (${count(status.trial)} of ${count(status.runs)})` : "";
    text($("run"), `run ${status.folder || status.run}${place}`);
    document.title = `${percent(progress())} · ${status.folder || status.run}`;
    text($("model"), status.model);
    const phase = $("phase");
    text(phase, status.end ? `ended: ${status.end}` : status.phase);
    phase.className = `pill ${status.error ? "bad" : status.end || status.trains ? "good" : "soft"}`;
    $("bar").value = progress() || 0;
    text($("steps"), stepWords());
    tiles();
    if (status.diagnosis.cause !== "not training") diagnosis = status.diagnosis;
    const why = $("why"), found = status.end && diagnosis ? diagnosis : status.diagnosis;
    why.hidden = !found.sentence || found.cause === "not training" || (status.end && found === status.diagnosis);
    text(why, status.end ? `In its last minute: ${found.sentence}` : found.sentence);
    why.className = `why ${{ nothing: "good", late: "bad", slow: "soft", cable: "soft", encode: "soft" }[found.cause] || ""}`;
    $("averaging").hidden = !status.averaging;
    text($("averaging"), status.averaging);
    evaluates();
    Machines.remember(status);
    Machines.picture($("topology"), status);
    Machines.table($("rounds").tBodies[0], status);
    ledger();
    settings();
    remember(status);
    text($("made"), `State of ${new Date(status.made_at * 1000).toLocaleString("en-GB")}.`);
  }
  // May there be evaluations? Without an observer, and where the run ended before the first, none.
  function evaluates() {
    const there = status.evaluations.length > 0 || (curves && curves.eval_step.length > 0);
    const may = there || (!status.end && status.settings.observer !== "false");
    if (may === Charts.view.evaluates) return;
    Charts.view.evaluates = may;
    Charts.draw();
    legend();
  }
  const progress = () => (status.total_steps ? Math.min(1, status.step / status.total_steps) : null);
  function stepWords() {
    const words = [status.total_steps ? `step ${count(status.step)} of ${count(status.total_steps)}` : `step ${count(status.step)}`];
    if (known(progress())) words.push(percent(progress()));
    if (known(status.epoch)) words.push(`epoch ${status.epoch} of ${count(status.num_epochs)}`);
    if (known(status.eta_s) && status.trains) words.push(`${duration(status.eta_s)} left`);
    return words.join(" · ");
  }
  function tiles() {
    const evaluation = status.evaluations[status.evaluations.length - 1];
    const figures = [["loss", number(status.loss)]];
    if (evaluation) {
      if (known(evaluation.loss)) figures.push(["validation loss", number(evaluation.loss)]);
      for (const [name, value] of Object.entries(evaluation.metrics).slice(0, 3)) {
        if (known(value)) figures.push([`${cut(name, 30)}, step ${count(evaluation.step)}`, metric(name, value)]);
      }
    }
    let seconds = status.seconds;
    if (status.end && curves && curves.seconds.length) {
      seconds = curves.seconds[curves.seconds.length - 1];
      figures.push(["samples/s, mean", count(curves.samples.reduce((a, b) => a + b, 0) / seconds)], ["steps/s, mean", number(status.step / seconds, 3)]);
    } else figures.push(["samples/s", count(status.samples_per_s)], ["steps/s", number(status.steps_per_s, 3)]);
    figures.push(["time", duration(seconds)]);
    if (known(status.learning_rate)) figures.push(["learning rate", number(status.learning_rate)]);
    if (status.end) figures.push(["sent", bytes(status.sent_bytes)], ["received", bytes(status.received_bytes)]);
    else figures.push([`sent, ${bytes(status.sent_bytes)} in all`, rate(status.sent_bytes_per_s)], [`received, ${bytes(status.received_bytes)} in all`, rate(status.received_bytes_per_s)]);
    const place = $("tiles");
    while (place.children.length > figures.length) place.lastChild.remove();
    figures.forEach(([name, value], at) => {
      const tile = place.children[at] || place.appendChild(el("div", { class: "tile" }, el("b"), el("span")));
      text(tile.children[0], value);
      text(tile.children[1], name);
    });
  }
  let counted = "";
  function ledger() {
    const s = status.samples, key = JSON.stringify(s);
    if (key === counted) return;
    counted = key;
    const todo = Math.max(0, s.total - s.done - s.partly - s.skipped - s.leased);
    const parts = [["done", s.done, "compute"], ["leased", s.leased, "encode"], ["partly", s.partly, "cable"], ["skipped", s.skipped, "latepart"], ["to do", s.total ? todo : 0, "wait"]];
    const all = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
    const bar = svg("svg", { class: "stack", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": "Samples: " + parts.map(([name, value]) => `${name} ${count(value)}`).join(", ") });
    let x = 0;
    for (const [, value, style] of parts) {
      bar.append(svg("rect", { x: x.toFixed(3), width: ((100 * value) / all).toFixed(3), height: 10, class: style }));
      x += (100 * value) / all;
    }
    $("ledger").replaceChildren(bar, el("ul", { class: "legend" }, ...parts.map(([name, value, style]) => el("li", {}, el("i", { class: style }), `${name} ${count(value)}`))),
      el("p", { class: "muted" }, `${count(s.returned)} were returned and handed out again.${s.of_epoch ? ` One epoch has ${count(s.of_epoch)}.` : ""}`));
  }
  let set = "";
  function settings() {
    const key = JSON.stringify(status.settings);
    if (key === set) return;
    set = key;
    const rows = Object.entries(status.settings).map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "break" }, value)));
    $("settings").replaceChildren(rows.length ? el("table", {}, el("tbody", {}, ...rows)) : el("p", { class: "muted" }, "all are"));
  }

  // ---------------------------------------------------------------- log and events

  // Lines and events of the log so far, or of a status: those that are new.
  function remember(found) {
    let fresh = false;
    const last = lines.length ? lines[lines.length - 1] : null;
    const from = last ? found.lines.findLastIndex((line) => line.at === last.at && line.text === last.text) + 1 : 0;
    for (const line of found.lines.slice(from)) { if (!last || from || line.at >= last.at) { lines.push(line); fresh = true; } }
    lines = lines.slice(-LINES);
    if (fresh) log();
    const before = events.size;
    for (const event of found.events) events.set(`${event.kind} ${event.step} ${event.at} ${event.text}`, event);
    if (events.size !== before) marks();
  }
  function log() {
    const place = $("lines"), word = $("filter").value.toLowerCase(), only = $("warnings").checked;
    const below = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
    const found = lines.filter((line) => (!only || line.warning) && (!word || line.text.toLowerCase().includes(word)));
    place.replaceChildren(...(found.length ? found.slice(-500).map((line) =>
      el("li", line.warning ? { class: "warning" } : {}, el("span", { class: "at" }, clock(line.at)), line.warning ? `warning: ${line.text}` : line.text))
      : [el("li", { class: "muted" }, lines.length ? "no line has that" : "nothing yet")]));
    if (below) place.scrollTop = place.scrollHeight;
  }
  function marks() {
    while (events.size > EVENTS) events.delete(events.keys().next().value);
    const found = [...events.values()].sort((a, b) => a.at - b.at);
    Charts.marks(found);
    $("events").replaceChildren(...found.slice(-200).reverse().map((event) =>
      el("li", {}, el("span", { class: "at" }, clock(event.at)), el("span", { class: "at" }, `step ${count(event.step)}`), el("i", { class: `mark ${event.kind}` }), `${event.kind}${event.text ? `: ${event.text}` : ""}`)));
    if (!found.length) $("events").replaceChildren(el("li", { class: "muted" }, "nothing yet"));
  }

  // ---------------------------------------------------------------- earlier runs

  async function earlier() {
    const answer = await fetch("runs.json");
    if (!answer.ok) return;
    const runs = await answer.json();
    $("earlier").hidden = !runs.length;
    $("runs").tBodies[0].replaceChildren(...runs.map((run) => {
      const box = el("input", { type: "checkbox", "aria-label": `lay ${run.name} beside this run` });
      box.checked = others.has(run.name);
      box.addEventListener("change", () => beside(run.name, box));
      return el("tr", {}, el("td", {}, box), el("td", { class: "name" }, run.name), el("td", { class: "break" }, [run.model, run.data].filter(Boolean).join(", ")), el("td", { class: "number" }, count(run.steps)),
        el("td", { class: "number" }, count(run.samples_per_s)), el("td", { class: "break" }, run.result), el("td", { class: "break" }, run.end));
    }));
  }
  async function beside(name, box) {
    if (!box.checked) others.delete(name);
    else if (others.size >= BESIDE) { box.checked = false; return; }
    else {
      const answer = await fetch(`curves.json?run=${encodeURIComponent(name)}`);
      if (!answer.ok) { box.checked = false; return; }
      others.set(name, await answer.json());
    }
    Charts.beside(others);
    legend();
  }
  function legend() {
    const swatch = (name, words) => {
      const box = el("i");
      box.style.background = `var(--${name})`;
      return el("li", {}, box, words);
    };
    $("legend").replaceChildren(swatch("blue", "training loss (band: single steps)"),
      ...(Charts.view.evaluates ? [swatch("orange", "validation loss")] : []),
      ...[...others.keys()].map((name, at) => swatch(Charts.OTHERS[at % Charts.OTHERS.length], `${name} (dashed)`)));
  }

  // ---------------------------------------------------------------- the stream

  let tries = 0, heard = 0;
  function connect() {
    heard = Date.now();
    const stream = new EventSource("events");
    stream.addEventListener("status", (event) => { heard = Date.now(); alive(); const next = JSON.parse(event.data); if (status && next.run !== status.run) { location.reload(); return; } show(next); });
    stream.addEventListener("curves", (event) => { alive(); if (!take(JSON.parse(event.data))) { stream.close(); again(); } });
    stream.addEventListener("log", (event) => remember(JSON.parse(event.data)));
    stream.addEventListener("end", (event) => { ended = JSON.parse(event.data).text; });
    stream.addEventListener("beat", alive);
    stream.onopen = () => { tries = 0; curves = null; alive(); earlier(); };
    stream.onerror = async () => {
      stream.close();
      const answer = await fetch("enter", { cache: "no-store" }).catch(() => null);
      if (answer && answer.status === 401) { ask(); return; }
      lost(answer && answer.status === 503 ? "the page has too many viewers" : "");
      again();
    };
  }
  // The page's process answers, but its server may be stopped or stuck.
  function watch() {
    if (status && !status.end && $("gone").hidden && Date.now() - heard > SILENT_MS) {
      text($("gone"), `The server has said nothing since ${new Date(heard).toLocaleTimeString("en-GB")}. What you see is the last state.`);
      $("gone").hidden = false;
    }
  }
  const again = () => setTimeout(connect, RETRY_MS[Math.min(tries++, RETRY_MS.length - 1)]);
  function alive() {
    seen = Date.now();
    if (seen - heard < SILENT_MS) $("gone").hidden = true;
  }
  function lost(why) {
    const since = seen ? ` since ${new Date(seen).toLocaleTimeString("en-GB")}` : "";
    const words = why || ended || `the server does not answer${since}`;
    text($("gone"), `${words[0].toUpperCase()}${words.slice(1)}. ${status ? "What you see is the last state; the page goes on by itself when a server is there again." : "The page tries again by itself."}`);
    $("gone").hidden = false;
    if (!status) text($("phase"), "no server");
    else if (!status.end) { text($("phase"), ended ? "no server" : "no answer"); $("phase").className = "pill bad"; }
  }

  // ---------------------------------------------------------------- the watch token

  function ask() {
    $("all").hidden = true;
    $("enter").hidden = false;
    text($("phase"), "needs the watch token");
  }
  async function enter(token) {
    const answer = await fetch("enter", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token }) }).catch(() => null);
    if (answer && answer.ok) {
      $("all").hidden = false;
      $("enter").hidden = true;
      connect();
      return;
    }
    ask();
    text($("refused"), answer ? "This is not the watch token of this server." : "The server does not answer.");
  }

  // ---------------------------------------------------------------- begin

  function controls() {
    const theme = $("theme"), root = document.documentElement;
    try { theme.value = localStorage.getItem("theme") || ""; } catch { /* from disk there may be none */ }
    const paint = () => {
      if (theme.value) root.dataset.theme = theme.value; else delete root.dataset.theme;
      Charts.draw();
      Machines.forget();
      if (status) show(status);
    };
    theme.addEventListener("change", () => { try { localStorage.setItem("theme", theme.value); } catch { /* the same */ } paint(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    const view = (name, read) => (event) => { Charts.view[name] = read(event.target); Charts.draw(); };
    $("smooth").addEventListener("input", view("smooth", (input) => Number(input.value)));
    $("log").addEventListener("change", view("log", (input) => input.checked));
    $("by").addEventListener("change", (event) => { Charts.view.range = null; view("by", (input) => input.value)(event); });
    $("metric").addEventListener("change", view("metric", (input) => input.value));
    $("whole").addEventListener("click", () => Charts.zoom(1, 0));
    $("nearer").addEventListener("click", () => Charts.newest(0.5));
    $("farther").addEventListener("click", () => Charts.newest(2));
    $("filter").addEventListener("input", log);
    $("warnings").addEventListener("change", log);
    $("enter").addEventListener("submit", (event) => { event.preventDefault(); enter($("token").value.trim()); });
    new ResizeObserver(() => { if (status) Machines.picture($("topology"), status); }).observe($("topology"));
    if (theme.value) root.dataset.theme = theme.value;
  }

  controls();
  Charts.begin($("charts"));
  Machines.legend($("parts"));
  legend();
  log();
  marks();
  if (embedded) {
    $("trace").remove();
    const data = JSON.parse(embedded.textContent);
    lines = data.lines || [];
    for (const round of data.rounds || []) Machines.rounds.set(round[0], round);
    diagnosis = data.diagnosis;
    take(data.curves);
    show(data.status);
    log();
  } else if (location.hash.length > 1) {
    const token = decodeURIComponent(location.hash.slice(1));
    history.replaceState(null, "", location.pathname);
    enter(token);
  } else connect();
  if (!embedded) setInterval(watch, 1000);
})();
