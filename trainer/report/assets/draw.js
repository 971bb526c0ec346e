// Elements, numbers in words, scales and colours.
const PALETTE = ["#3b78d8", "#e0752d", "#3a9d5d", "#c44ba8", "#8d6ad6", "#c9a227", "#18a3b8", "#d6485d", "#7a8c2f", "#a0674b",
  "#5c6f9e", "#e58fb0"];

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "color") node.style.background = value;
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : String(value));
  }
  // Strings become text nodes, never markup.
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function number(value) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1e12) return `${short(value / 1e12)} T`;
  if (size >= 1e9) return `${short(value / 1e9)} G`;
  if (size >= 1e6) return `${short(value / 1e6)} M`;
  if (size >= 1e4) return `${short(value / 1e3)} k`;
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(size >= 1000 ? 4 : 5)));
}

function short(value) {
  return String(Number(value.toPrecision(4)));
}

function seconds(value) {
  if (value < 1) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 100) return `${Number(value.toPrecision(3))} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Number((value / 3600).toPrecision(3))} h`;
  return `${Number((value / 86400).toPrecision(3))} d`;
}

function onAxis(axis, value) {
  return axis === "time" ? seconds(value) : number(value);
}

function moment(at) {
  if (!at) return "";
  const local = new Date(at * 1000), two = (n) => String(n).padStart(2, "0");
  return `${local.getFullYear()}-${two(local.getMonth() + 1)}-${two(local.getDate())} ${two(local.getHours())}:${two(local.getMinutes())}:${two(local.getSeconds())}`;
}

// From values to 0..1 and back.
function scale(low, high, logarithmic) {
  const to = logarithmic ? Math.log10 : (v) => v, back = logarithmic ? (v) => 10 ** v : (v) => v;
  let a = to(low), b = to(high);
  if (!(b > a)) { const wide = Math.abs(a) * 0.05 || 0.5; a -= wide; b += wide; }
  return {
    at: (v) => (to(v) - a) / (b - a),
    value: (u) => back(a + u * (b - a)),
    ticks: (count) => (logarithmic ? logTicks(a, b, count) : ticks(a, b, count)),
  };
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found.map((v) => Number(v.toPrecision(12)));
}

function logTicks(low, high, count) {
  if (high - low < 0.7) return ticks(10 ** low, 10 ** high, count).filter((v) => v > 0);
  const found = [], every = Math.max(1, Math.round((high - low) / count));
  for (let power = Math.floor(low); power <= high; power++) {
    for (const m of high - low > 3 ? [1] : [1, 2, 5]) {
      const value = Math.log10(m) + power;
      if (value >= low - 1e-9 && value <= high + 1e-9 && power % every === 0) found.push(m * 10 ** power);
    }
  }
  return found;
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// A colour for each run: of its own, or by a field's value; numbers run from blue to orange.
function colours(data, by) {
  const runs = data.runs, light = isDark() ? 62 : 45;
  const own = (n) => (n < PALETTE.length && runs.length <= PALETTE.length ? PALETTE[n] : `hsl(${(n * 137.5) % 360} 60% ${light}%)`);
  if (!by) return runs.map((run) => own(run.index));
  const values = runs.map((run) => run.fields.get(by)), different = [...new Set(values)];
  const numeric = different.every((v) => typeof v === "number");
  if (!numeric) return values.map((v) => PALETTE[different.indexOf(v) % PALETTE.length]);
  const sorted = different.sort((a, b) => a - b);
  return values.map((v) => {
    const part = sorted.length > 1 ? sorted.indexOf(v) / (sorted.length - 1) : 0;
    return `hsl(${part < 0.5 ? 225 + 110 * part : 320 + 140 * (part - 0.5)} 70% ${light + (part < 0.5 ? 4 : 6)}%)`;
  });
}

function choice(label, options, current, change) {
  const buttons = options.map(([value, text]) => element("button", {
    type: "button", "aria-pressed": String(value === current), "data-value": value,
    onclick: () => {
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === String(value))));
      change(value);
    },
  }, text));
  return element("span", { class: "choice", role: "group", "aria-label": label, "data-choice": label }, ...buttons);
}

function onOff(label, on, change) {
  const button = element("button", {
    type: "button", "aria-pressed": String(on), "data-toggle": label,
    onclick: () => {
      const now = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(now));
      change(now);
    },
  }, label);
  return element("span", { class: "choice" }, button);
}

function select(label, options, current, change) {
  const list = element("select", { "data-select": label, onchange: () => change(list.value) },
    ...options.map(([value, text]) => element("option", { value, selected: value === current }, text)));
  return element("label", {}, label, list);
}
