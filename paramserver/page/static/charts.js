// The curves: loss, a metric, samples a second; with events as marks, and other runs beside this one.
"use strict";
const Charts = (() => {
  const { el, colour, number, metric, count, duration, clock, cut, known } = Shown;
  const OTHERS = ["violet", "green", "red", "orange", "grey"];
  const HEIGHT = { loss: 260, metric: 200, rate: 200 };
  const view = { smooth: 0.6, log: false, by: "step", metric: "", range: null, evaluates: true };
  let run = null, others = new Map(), events = [], plots = [], place = null;

  function smoothed(values) {
    let mean = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return weight ? mean / weight : null;
      mean = view.smooth * mean + (1 - view.smooth) * value;
      weight = view.smooth * weight + (1 - view.smooth);
      return mean / weight;
    });
  }
  function rates(curves) {
    // By the clock, pauses included, over stretches of several bins.
    const reach = Math.max(1, Math.round(curves.step.length / 150));
    return curves.step.map((_, place) => {
      const before = place - reach;
      const since = before >= 0 ? curves.seconds[before] : 0;
      const taken = curves.seconds[place] - since;
      let samples = 0;
      for (let at = Math.max(0, before + 1); at <= place; at++) samples += curves.samples[at];
      return taken > 0 && (before >= 0 || place > 0) ? samples / taken : null;
    });
  }
  const xs = (curves) => (view.by === "step" ? curves.step : curves.seconds);
  const evalXs = (curves) => (view.by === "step" ? curves.eval_step : curves.eval_seconds);
  const positive = (values) => (view.log ? values.map((v) => (v > 0 ? v : null)) : values);

  // uPlot wants ascending and different x.
  function table(x, ...columns) {
    const keep = [];
    let last = -Infinity;
    x.forEach((value, at) => { if (value > last) { keep.push(at); last = value; } });
    if (keep.length === x.length) return [x, ...columns];
    return [keep.map((at) => x[at]), ...columns.map((column) => keep.map((at) => column[at]))];
  }

  // For each chart: tables of columns, and a description of each column.
  function loss() {
    const tables = [], series = [];
    if (run) {
      tables.push(table(xs(run), positive(run.low), positive(run.high), positive(smoothed(run.loss))));
      series.push({ label: "lowest", stroke: colour("band"), width: 1, points: { show: false } },
        { label: "highest", stroke: colour("band"), width: 1, points: { show: false } },
        { label: "training", stroke: colour("blue"), width: 2, spanGaps: true });
      tables.push(table(evalXs(run), positive(run.evals.loss || [])));
      series.push({ label: "validation", stroke: colour("orange"), width: 2, spanGaps: true, points: { show: (run.eval_step.length < 60), size: 6, fill: colour("orange") } });
    }
    beside((curves) => table(xs(curves), positive(smoothed(curves.loss))), tables, series);
    return { tables, series, bands: run ? [{ series: [2, 1], fill: colour("band") }] : [] };
  }
  function metrics() {
    const tables = [], series = [], name = view.metric;
    if (run && run.evals[name]) {
      tables.push(table(evalXs(run), positive(run.evals[name])));
      series.push({ label: name, stroke: colour("green"), width: 2, spanGaps: true, points: { show: run.eval_step.length < 60, size: 6, fill: colour("green") } });
    }
    beside((curves) => curves.evals[name] && table(evalXs(curves), positive(curves.evals[name])), tables, series);
    return { tables, series, bands: [] };
  }
  function rate() {
    const tables = [], series = [];
    if (run) {
      tables.push(table(xs(run), smoothed(rates(run))));
      series.push({ label: "samples/s", stroke: colour("ink"), width: 1.6, spanGaps: true });
    }
    beside((curves) => table(xs(curves), smoothed(rates(curves))), tables, series);
    return { tables, series, bands: [] };
  }
  function beside(column, tables, series) {
    let at = 0;
    for (const [name, curves] of others) {
      const shown = column(curves), stroke = colour(OTHERS[at++ % OTHERS.length]);
      if (!shown) continue;
      tables.push(shown);
      series.push({ label: name, stroke, width: 1.5, dash: [6, 4], spanGaps: true });
    }
  }

  const KINDS = [
    { name: "loss", title: () => "Loss", data: loss, form: number },
    { name: "metric", title: () => (view.metric ? `Validation ${view.metric}` : "Validation"), data: metrics, form: (value) => metric(view.metric, value) },
    { name: "rate", title: () => "Samples per second", data: rate, form: count },
  ];

  // Events as lines from top to bottom; those of one pixel are one line.
  const MARKS = { joined: "green", gone: "red", snapshot: "violet", checkpoint: "grey", restart: "orange", ended: "ink" };
  function placeOf(event) {
    if (view.by === "step") return event.step;
    if (!run || !run.step.length) return null;
    const at = run.step.findIndex((step) => step >= event.step);
    return run.seconds[at < 0 ? run.step.length - 1 : at];
  }
  function drawMarks(plot) {
    const { ctx, bbox } = plot, drawn = new Set();
    ctx.save();
    for (const event of events) {
      const at = placeOf(event);
      if (at === null) continue;
      const x = Math.round(plot.valToPos(at, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width || drawn.has(`${x} ${event.kind}`)) continue;
      drawn.add(`${x} ${event.kind}`);
      ctx.strokeStyle = ctx.fillStyle = colours[event.kind] || colours.ended;
      ctx.globalAlpha = event.kind === "checkpoint" ? 0.35 : 0.75;
      ctx.setLineDash(event.kind === "checkpoint" ? [2, 4] : []);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.beginPath();
      ctx.moveTo(x - 4, bbox.top);
      ctx.lineTo(x + 4, bbox.top);
      ctx.lineTo(x, bbox.top + 7);
      ctx.fill();
    }
    ctx.restore();
  }
  let colours = {};

  function build(kind) {
    const frame = place.querySelector(`[data-chart="${kind.name}"] .plot`);
    const { tables, series, bands } = kind.data();
    const width = Math.max(120, frame.clientWidth);
    frame.replaceChildren();
    if (!tables.length || tables.every((columns) => !columns[0].length)) {
      frame.append(el("p", { class: "muted" }, kind.name === "metric" ? "no evaluation yet" : "no steps yet"));
      return null;
    }
    const now = place.querySelector(`[data-chart="${kind.name}"] .now`);
    const axis = { stroke: colour("muted"), grid: { stroke: colour("soft"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const time = view.by === "seconds";
    const options = {
      width, height: HEIGHT[kind.name], legend: { show: false },
      cursor: { drag: { x: true, y: false, setScale: false }, sync: { key: "run" }, points: { size: 6 } },
      scales: { x: { time: false, range: (_, low, high) => view.range || whole(low, high) }, y: { distr: view.log && kind.name !== "rate" ? 3 : 1, range: limits(kind) } },
      axes: [
        { ...axis, size: 32, values: (_, ticks) => ticks.map((v) => (time ? duration(v) : count(v))), space: 70 },
        { ...axis, size: 62, values: (_, ticks) => ticks.map((v) => (v === null || v === undefined ? "" : kind.form(v))) },
      ],
      bands,
      series: [{}, ...series.map((each) => ({ points: { show: tables[0][0].length < 2 }, ...each }))],
      hooks: {
        draw: [drawMarks],
        setSelect: [(plot) => {
          if (plot.select.width > 4) {
            zoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
          }
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        }],
        setCursor: [(plot) => point(plot, kind, now)],
      },
    };
    return new uPlot(options, joined(tables), frame);
  }
  const joined = (tables) => (tables.length === 1 ? tables[0] : uPlot.join(tables));
  function whole(low, high) {
    if (!known(low) || !known(high)) return [0, 1];
    if (low <= 0.1 * high) low = 0;
    return low === high ? [low - 1, high + 1] : [low, high + 0.01 * (high - low)];
  }
  function limits(kind) {
    return (plot, low, high) => {
      if (!known(low) || !known(high)) return view.log ? [0.1, 1] : [0, 1];
      if (view.log && kind.name !== "rate") return uPlot.rangeLog(low, high, 10, false);
      if (kind.name === "loss") high = usual(plot, high);
      if (kind.name === "rate") return [0, 1.12 * high || 1];
      const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
      return [kind.name === "loss" && low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    };
  }
  // Outliers of single steps may be cut off, the curves may not.
  function usual(plot, highest) {
    const [from, to] = [plot.scales.x.min, plot.scales.x.max];
    let top = -Infinity;
    plot.data.forEach((column, place) => {
      if (place === 0 || (run && (place === 1 || place === 2))) return;
      column.forEach((value, at) => {
        if (known(value) && value > top && !(plot.data[0][at] < from) && !(plot.data[0][at] > to)) top = value;
      });
    });
    return top > -Infinity ? Math.min(highest, 1.3 * top) : highest;
  }
  function point(plot, kind, now) {
    const at = plot.cursor.idx;
    if (at === null || at === undefined) { now.textContent = latest(plot, kind); return; }
    const x = plot.data[0][at];
    const words = [view.by === "step" ? `step ${count(x)}` : duration(x)];
    plot.series.forEach((series, place) => {
      const value = plot.data[place][at];
      if (place && known(value) && series.stroke && !["lowest", "highest"].includes(series.label)) words.push(`${cut(series.label, 30)} ${kind.form(value)}`);
    });
    if (view.by === "step") {
      const near = (plot.scales.x.max - plot.scales.x.min) / 150;
      words.push(...events.filter((e) => Math.abs(e.step - x) <= near).slice(-3).map((e) => cut(e.text || e.kind, 60)));
    }
    now.textContent = words.join(" · ");
  }
  function latest(plot, kind) {
    const words = [];
    plot.series.forEach((series, place) => {
      if (!place || ["lowest", "highest"].includes(series.label)) return;
      const column = plot.data[place];
      for (let at = column.length - 1; at >= 0; at--) {
        if (known(column[at])) { words.push(`${cut(series.label, 30)} ${kind.form(column[at])}`); break; }
      }
    });
    return words.join(" · ");
  }

  function zoom(low, high) {
    view.range = low < high ? [low, high] : null;
    for (const plot of plots) if (plot) plot.setData(plot.data, true);
  }
  // So many times the part that is shown, up to its end.
  function newest(times) {
    const plot = plots.find((each) => each);
    if (!plot) return;
    const { min, max } = plot.scales.x;
    move(plot, max - times * (max - min), max);
  }
  function move(plot, min, max) {
    const all = plot.data[0];
    if (min <= Math.min(0, all[0]) && max >= all[all.length - 1]) zoom(1, 0);
    else zoom(min, max);
  }
  function keyed(event, kind) {
    const plot = plots[KINDS.indexOf(kind)];
    if (!plot || event.ctrlKey || event.metaKey || event.altKey) return;
    let { min, max } = plot.scales.x;
    const span = max - min;
    if (event.key === "+" || event.key === "=") { min += span / 4; max -= span / 4; }
    else if (event.key === "-" || event.key === "−") { min -= span / 2; max += span / 2; }
    else if (event.key === "ArrowLeft") { min -= span / 5; max -= span / 5; }
    else if (event.key === "ArrowRight") { min += span / 5; max += span / 5; }
    else if (event.key === "0") { event.preventDefault(); zoom(1, 0); return; }
    else return;
    event.preventDefault();
    move(plot, min, max);
  }

  function draw() {
    if (!place) return;
    colours = Object.fromEntries(Object.entries(MARKS).map(([kind, name]) => [kind, colour(name)]));
    for (const plot of plots) if (plot) plot.destroy();
    plots = KINDS.map((kind) => {
      const block = place.querySelector(`[data-chart="${kind.name}"]`);
      const plot = build(kind);
      block.hidden = !plot && kind.name === "metric" && !view.evaluates;
      block.querySelector("h3").textContent = kind.title();
      const words = plot ? latest(plot, kind) : "";
      block.querySelector(".now").textContent = words;
      block.querySelector(".plot").setAttribute("aria-label", `${kind.title()}: ${words || "nothing yet"}`);
      return plot;
    });
  }
  function update() {
    KINDS.forEach((kind, at) => {
      const plot = plots[at], { tables } = kind.data();
      if (!plot) { if (tables.some((columns) => columns[0].length)) draw(); return; }
      const data = joined(tables);
      if (data.length !== plot.data.length) { draw(); return; }
      plot.setData(data, true);
      const block = place.querySelector(`[data-chart="${kind.name}"]`);
      const words = latest(plot, kind);
      if (plot.cursor.idx === null || plot.cursor.idx === undefined) block.querySelector(".now").textContent = words;
      block.querySelector(".plot").setAttribute("aria-label", `${kind.title()}: ${words}`);
    });
  }

  function begin(element) {
    place = element;
    for (const kind of KINDS) {
      const plot = el("div", { class: "plot", tabindex: "0", role: "img" });
      plot.addEventListener("keydown", (event) => keyed(event, kind));
      plot.addEventListener("dblclick", () => zoom(1, 0));
      place.append(el("div", { class: "chart", "data-chart": kind.name }, el("h3", {}, kind.title()), plot, el("div", { class: "now muted" })));
    }
    let width = 0;
    new ResizeObserver(() => { if (place.clientWidth !== width) { width = place.clientWidth; draw(); } }).observe(place);
    draw();
  }

  return {
    begin, draw, zoom, newest, view, OTHERS,
    set: (curves) => { run = curves; update(); },
    marks: (found) => { events = found; for (const plot of plots) if (plot) plot.redraw(false); },
    beside: (found) => { others = found; draw(); },
  };
})();
