// The machines: a picture of them and their links, and where the time of their rounds went.
"use strict";
const Machines = (() => {
  const { el, svg, text, cut, known, bits, bytes, count, duration, percent } = Shown;
  const PARTS = ["compute", "encode", "cable", "wait", "late"];
  const MEANING = {
    compute: "compute: forward, backward, optimizer", encode: "encode: making gradients ready to be sent",
    cable: "cable: the exchange itself", wait: "wait: for other machines", late: "late: rounds that closed without it",
  };
  const styled = (part) => (part === "late" ? "latepart" : part);
  const SERVER = 0, OBSERVER = -1, KEPT = 60;
  const role = (machine) => (machine.id === SERVER ? "server" : machine.id === OBSERVER ? "observer" : `worker ${machine.id}`);

  // Small drawings, 22 x 18.
  const ICONS = {
    server: ["M2 2h18v6H2z", "M2 10h18v6H2z", "M5 5h1", "M5 13h1"],
    observer: ["M1 9q10-13 20 0q-10 13-20 0z", "M8 9a3 3 0 1 0 6 0a3 3 0 1 0-6 0"],
    cuda: ["M1 3h20v11H1z", "M3 14v3h8v-3", "M5 8.5a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0", "M12 8.5a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0"],
    mps: ["M3 6q0-3 3-3h10q3 0 3 3v7q0 2-2 2H5q-2 0-2-2z", "M3 11h16", "M15 13h1"],
    board: ["M2 2h18v14H2z", "M6 6h6v6H6z", "M15 5h2", "M15 9h2", "M5 16v-1", "M9 16v-1", "M13 16v-1"],
    cpu: ["M5 3h12v12H5z", "M8 6h6v6H8z", "M2 6h3", "M2 12h3", "M17 6h3", "M17 12h3", "M8 1v2", "M14 1v2", "M8 15v2", "M14 15v2"],
  };
  function icon(machine) {
    if (machine.id === SERVER) return ICONS.server;
    if (machine.id === OBSERVER) return ICONS.observer;
    if (machine.device.startsWith("cuda")) return ICONS.cuda;
    if (machine.device.startsWith("mps")) return ICONS.mps;
    return /raspberry|cortex/i.test(machine.kind) ? ICONS.board : ICONS.cpu;
  }

  function linkWords(links) {
    return links.map((link) => {
      const measured = known(link.measured_bytes_per_s) ? link.measured_bytes_per_s : link.expected_bytes_per_s;
      const words = [link.kind, known(measured) ? bits(measured) : ""].filter(Boolean);
      if (links.length > 1) words.push(`carries ${percent(link.share)}`);
      return words.join(" · ");
    });
  }
  function work(machine) {
    const words = [];
    if (machine.id > 0 && known(machine.samples_per_s)) words.push(`${count(machine.samples_per_s)} samples/s`);
    if (known(machine.share)) words.push(`share ${count(machine.share)}`);
    return words.join(" · ");
  }
  function body(machine) {
    const words = [];
    if (known(machine.memory_bytes)) words.push(bytes(machine.memory_bytes));
    if (known(machine.temperature_c)) words.push(`${Math.round(machine.temperature_c)} °C`);
    return words.join(" · ");
  }

  // ---------------------------------------------------------------- the picture

  let drawn = "";
  function picture(place, status) {
    const width = Math.max(280, place.clientWidth || 280);
    const key = JSON.stringify([width, status.machines.map((m) => [m.id, m.host, m.device, m.kind, m.state, m.trouble, work(m), body(m)]), status.links]);
    if (key === drawn) return;
    drawn = key;
    const workers = status.machines.filter((machine) => machine.id > 0);
    const others = status.machines.filter((machine) => machine.id <= 0).sort((a, b) => b.id - a.id);
    const links = new Map(), compact = workers.length > 12;
    for (const link of status.links) links.set(link.machine, [...(links.get(link.machine) || []), link]);
    const gap = compact ? 12 : 20, wide = Math.min(compact ? 128 : 196, (width - gap - 4) / 2);  // 4: of two frames
    const lines = new Map(status.machines.map((m) => [m.id, inWords(m, links.get(m.id) || [], compact, wide)]));
    const tall = (some, each) => 12 + each * Math.max(1, ...some.map((m) => lines.get(m.id).length));
    const high = tall(workers, compact ? 16 : 16.5), head = tall(others, 16.5);
    const columns = Math.max(1, Math.min(workers.length || 1, Math.floor((width + gap) / (wide + gap))));
    const rows = Math.ceil(workers.length / columns);
    const top = head + 6, between = compact ? 22 : 46;
    const height = top + (rows ? between : 0) + rows * (high + gap);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": described(status, workers) });
    const boxes = [];
    const step = Math.min(wide + gap, width / Math.max(1, others.length));
    others.forEach((machine, at) => {
      const centre = width / 2 + (at - (others.length - 1) / 2) * step;
      boxes.push({ machine, x: centre - Math.min(196, step - gap) / 2, y: 2, width: Math.min(196, step - gap), high: head });
    });
    const server = boxes.find((box) => box.machine.id === SERVER);
    workers.forEach((machine, at) => {
      const row = Math.floor(at / columns), inRow = Math.min(columns, workers.length - row * columns);
      const left = (width - inRow * wide - (inRow - 1) * gap) / 2;
      boxes.push({ machine, x: left + (at % columns) * (wide + gap), y: top + between + row * (high + gap), width: wide, high });
    });
    const fastest = Math.max(1, ...status.links.map((link) => link.measured_bytes_per_s || link.expected_bytes_per_s || 0));
    for (const box of boxes) {
      if (!server || box.machine.id <= 0) continue;
      const [x1, y1, x2, y2] = [server.x + server.width / 2, server.y + server.high, box.x + box.width / 2, box.y];
      const speed = Math.max(0, ...(links.get(box.machine.id) || []).map((link) => link.measured_bytes_per_s || link.expected_bytes_per_s || 0));
      picture.append(svg("path", {
        class: `edge ${box.machine.state}`, "stroke-width": (1 + 3 * Math.sqrt(speed / fastest)).toFixed(1),
        "stroke-opacity": compact ? "0.35" : "0.8",
        d: `M${x1} ${y1} C${x1} ${(y1 + y2) / 2} ${x2} ${(y1 + y2) / 2} ${x2} ${y2}`,
      }));
    }
    for (const box of boxes) picture.append(node(box, lines.get(box.machine.id), links.get(box.machine.id) || [], compact));
    place.replaceChildren(picture);
  }
  // The lines in a machine's box: words, style, and where they begin.
  function inWords(machine, links, compact, wide) {
    const small = compact && machine.id > 0, most = Math.floor((wide - 12) / 6.1);
    const path = linkWords(machine.id > 0 ? links : []), address = machine.id > 0 && links[0] ? links[0].address : "";
    const [name, place] = [role(machine), [machine.host, machine.device].filter(Boolean).join(" · ")];
    const all = small ? [[`${name} ${machine.host}`, ""], [machine.trouble || machine.state, "small status"], [work(machine), "small"]]
      : [[name, "", true], [place, "small", true], [machine.trouble || machine.state, "small status"], [work(machine), "small"], [body(machine), "small"],
        [path[0] || "", "small"], [path[1] || address, "small"]];
    return all.filter(([words]) => words).map(([words, style, beside]) => [cut(words, beside ? most - 5 : most), style, beside ? 36 : 8]);
  }
  function node({ machine, x, y, width, high }, lines, links, compact) {
    const small = compact && machine.id > 0;
    const group = svg("g", { class: machine.state, transform: `translate(${x} ${y})` });
    group.append(svg("title", {}, [role(machine), machine.host, machine.kind, machine.trouble, ...links.map((link) => link.address), ...linkWords(links)].filter(Boolean).join("\n")));
    group.append(svg("rect", { class: "box", width, height: high, rx: 7 }));
    if (!small) {
      group.append(svg("g", { class: "icon", transform: "translate(8 8)" }, ...icon(machine).map((d) => svg("path", { d }))));
    }
    lines.forEach(([words, style, left], at) => group.append(svg("text", { x: left, y: 17 + at * (small ? 16 : 16.5), class: style }, words)));
    return group;
  }
  function described(status, workers) {
    const states = new Map();
    for (const machine of workers) states.set(machine.state, (states.get(machine.state) || 0) + 1);
    return `${workers.length} workers around the server: ${[...states].map(([state, number]) => `${number} ${state}`).join(", ") || "none yet"}. The table below names each.`;
  }

  // ---------------------------------------------------------------- the rounds

  const rounds = new Map();  // step -> [step, seconds, {id: times}]
  const shown = new Map();  // id -> the row's parts
  function remember(status) {
    for (const round of status.rounds) rounds.set(round[0], round);
    const steps = [...rounds.keys()].sort((a, b) => a - b);
    for (const step of steps.slice(0, -KEPT)) rounds.delete(step);
  }
  function legend(place) {
    place.replaceChildren(...PARTS.map((part) => el("li", {}, el("i", { class: styled(part) }), MEANING[part])));
  }
  function row(machine) {
    const state = el("span", { class: "state" }), stack = svg("svg", { class: "stack", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    const rects = PARTS.map((part) => stack.appendChild(svg("rect", { y: 0, height: 10, class: styled(part) })));
    const words = el("span", { class: "words" }), speed = el("td", { class: "number" });
    const history = el("canvas", { class: "history", width: 240, height: 32, "aria-hidden": "true" });
    const name = el("span", {}), host = el("span", { class: "muted" });
    const made = el("tr", {}, el("td", { class: "name" }, name, " ", state, " ", host), el("td", {}, stack, words), el("td", {}, history), speed);
    return { made, name, host, state, rects, words, history, speed };
  }
  let order = "", told = "";
  function table(body, status) {
    const workers = status.machines.filter((machine) => machine.id > 0).sort((a, b) => a.id - b.id);
    for (const machine of workers) if (!shown.has(machine.id)) shown.set(machine.id, row(machine));
    const ids = workers.map((machine) => machine.id);
    for (const id of [...shown.keys()]) if (!ids.includes(id)) shown.delete(id);
    if (order !== ids.join()) {
      order = ids.join();
      body.replaceChildren(...ids.map((id) => shown.get(id).made));
    }
    const palette = PARTS.map((part) => Shown.colour(part));
    const recent = [...rounds.values()].sort((a, b) => a[0] - b[0]);
    const anew = told !== JSON.stringify([palette, recent.length && recent[recent.length - 1][0]]);
    told = JSON.stringify([palette, recent.length && recent[recent.length - 1][0]]);
    // A single long round may be cut off, or it would flatten all others.
    const times = recent.flatMap((round) => Object.values(round[2]).map(sum)).sort((a, b) => a - b);
    const longest = Math.max(1e-9, Math.min(times[times.length - 1] || 0, 1.5 * (times[Math.floor(0.9 * (times.length - 1))] || 0)));
    for (const machine of workers) {
      const parts = shown.get(machine.id), total = sum(machine.minute);
      text(parts.name, role(machine));
      const links = status.links.filter((link) => link.machine === machine.id);
      text(parts.host, [machine.host, machine.trouble, ...linkWords(links)].filter(Boolean).join(" · "));
      text(parts.state, machine.state);
      parts.state.setAttribute("class", `state ${machine.state}`);
      let at = 0;
      machine.minute.forEach((seconds, place) => {
        const share = total ? (100 * seconds) / total : 0;
        parts.rects[place].setAttribute("x", at.toFixed(2));
        parts.rects[place].setAttribute("width", share.toFixed(2));
        at += share;
      });
      const words = PARTS.map((part, place) => [part, total ? machine.minute[place] / total : 0]).filter(([, share]) => share >= 0.005);
      const late = machine.minute_late ? `, late in ${lateIn(machine)}` : "";
      text(parts.words, total ? words.map(([part, share]) => `${part} ${percent(share)}`).join(", ") + late : "no rounds yet");
      text(parts.speed, known(machine.samples_per_s) ? count(machine.samples_per_s) : Shown.NONE);
      if (anew) history(parts.history, machine.id, recent, longest, palette);
    }
  }
  function lateIn(machine) {
    const share = machine.minute_late / machine.minute_rounds;
    return share < 0.005 ? `${count(machine.minute_late)} of ${count(machine.minute_rounds)} rounds` : `${percent(share)} of the rounds`;
  }
  const sum = (times) => times.reduce((a, b) => a + b, 0);
  function history(canvas, id, recent, longest, palette) {
    const context = canvas.getContext("2d"), wide = canvas.width / KEPT;
    context.clearRect(0, 0, canvas.width, canvas.height);
    recent.forEach((round, at) => {
      const times = round[2][id];
      if (!times) return;
      let y = canvas.height;
      times.forEach((seconds, place) => {
        const high = (canvas.height * seconds) / longest;
        context.fillStyle = palette[place];
        context.fillRect(at * wide, y - high, Math.max(1, wide - 1), high);
        y -= high;
      });
    });
  }

  return { picture, table, legend, remember, forget: () => { drawn = told = ""; }, rounds, role, PARTS };
})();
