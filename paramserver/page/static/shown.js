// How values are shown, and how elements are made. Text from others is only ever set as text.
"use strict";
const Shown = (() => {
  const NONE = "–", FIGURE = 7;  // characters that fit everywhere
  const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

  function number(value, digits = 4) {
    if (!known(value)) return NONE;
    const size = Math.abs(value);
    const short = () => Number(value.toPrecision(3)).toExponential().replace("e-", "e−").replace("e+", "e");
    if (size >= 1e7) return short();
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    for (let places = size >= 100 ? 4 : digits; places >= 3; places--) {
      const plain = String(Number(value.toPrecision(places)));
      if (!plain.includes("e") && plain.replace("-", "").length <= FIGURE) return plain;
    }
    return short();
  }
  function count(value) {
    return known(value) ? Math.round(value).toLocaleString("en") : NONE;
  }
  function bytes(value) {
    if (!known(value)) return NONE;
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let place = 0;
    while (value >= 1000 && place < units.length - 1) { value /= 1000; place++; }
    return `${place && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
  }
  const rate = (value) => (known(value) ? `${bytes(value)}/s` : NONE);
  // The rate of a link, as in the server's sentences.
  function bits(value) {
    if (!known(value)) return NONE;
    const mega = (8 * value) / 1e6;
    return mega >= 100 ? `${(mega / 1000).toFixed(1)} Gbit/s` : `${mega.toFixed(mega >= 10 ? 0 : 1)} Mbit/s`;
  }
  function duration(seconds) {
    if (!known(seconds)) return NONE;
    if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
    if (seconds < 1) return `${Number((seconds * 1000).toPrecision(3))} ms`;
    if (seconds < 60) return `${seconds.toFixed(1)} s`;
    const whole = Math.round(seconds), hours = Math.floor(whole / 3600);
    const minutes = Math.floor((whole % 3600) / 60), rest = String(whole % 60).padStart(2, "0");
    return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
  }
  const percent = (share, digits = 0) => (known(share) ? `${(100 * share).toFixed(digits)} %` : NONE);
  const metric = (name, value) => (name === "accuracy" ? percent(value, 1) : number(value));
  function clock(at) {
    return at ? new Date(at * 1000).toLocaleTimeString("en-GB") : "";
  }

  function make(space, name, attributes, children) {
    const made = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  const el = (name, attributes, ...children) => make("", name, attributes, children);
  const svg = (name, attributes, ...children) =>
    make("http://www.w3.org/2000/svg", name, attributes, children);

  // A colour of the page's style as the canvas takes it: rgb(...).
  function colour(name) {
    const probe = document.documentElement.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }
  function text(element, words) {
    if (element.textContent !== words) element.textContent = words;
  }
  const cut = (words, most) => (words.length > most ? `${words.slice(0, most - 1)}…` : words);

  return { NONE, known, number, count, bytes, rate, bits, duration, percent, metric, clock, el, svg, colour, text, cut };
})();
