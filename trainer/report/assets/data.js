// What the page was given, unpacked; names out of files are keys of Maps, so that no name means anything.
const AXES = [["step", "step"], ["tokens", "tokens"], ["time", "time"], ["flops", "FLOPs"]];
const HIGHER = /acc|tokens_per_s|mfu|exact|f1|bleu|rouge/;

async function unpack() {
  const text = atob(document.getElementById("data").textContent);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).json();
  data.runs.forEach((run, index) => prepare(run, index));
  data.metrics = [...new Set(data.runs.flatMap((run) => [...run.curves.keys()]))].sort((a, b) => rank(a) - rank(b));
  data.result = data.metrics.includes("val_loss") ? "val_loss" : "loss";
  return data;
}

function prepare(run, index) {
  run.index = index;
  run.axis.step = added(run.axis.step);
  run.fields = new Map(Object.entries(run.fields));
  run.last = new Map(Object.entries(run.last));
  run.median = new Map(Object.entries(run.median));
  run.curves = new Map(Object.entries(run.curves).map(([name, [steps, values]]) => [name, { steps: added(steps), values }]));
  run.lost = run.life ? run.life.lost.down_s + run.life.lost.again_s : 0;
  run.starts = run.life ? run.life.starts.length : 0;
  run.hidden = false;
}

function added(differences) {
  let sum = 0;
  return differences.map((d) => (sum += d));
}

// Losses first, then what was evaluated, then the rest.
function rank(name) {
  const first = ["loss", "val_loss", "bits_per_byte"].indexOf(name);
  if (first >= 0) return first;
  if (name.startsWith("loss/") || name.startsWith("val_loss/")) return 10;
  if (name.startsWith("eval/")) return 20;
  const order = ["grad_norm", "lr", "tokens_per_s", "mfu", "step_time_s", "data_wait_s", "memory_gib"].indexOf(name);
  return order >= 0 ? 30 + order : 50;
}

function isHigherBetter(metric) {
  return HIGHER.test(metric);
}

// The place of a step on an axis: straight lines between what rows told; null where the run does not tell.
function place(run, axis, step) {
  if (axis === "step") return step;
  if (axis === "flops") {
    const tokens = place(run, "tokens", step);
    return run.flops === null || tokens === null ? null : tokens * run.flops;
  }
  const steps = run.axis.step, known = run.axis[axis];
  if (!known.length) return null;
  const right = Math.min(Math.max(lowerBound(steps, step), 1), steps.length - 1);
  if (steps.length < 2 || steps[right] === steps[right - 1]) return known[0];
  const part = (step - steps[right - 1]) / (steps[right] - steps[right - 1]);
  return known[right - 1] + part * (known[right] - known[right - 1]);
}

function lowerBound(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

function bestRun(data, metric) {
  let best = null;
  for (const run of data.runs) {
    const value = run.last.get(metric);
    if (value === undefined) continue;
    if (best === null || (isHigherBetter(metric) ? value > best.last.get(metric) : value < best.last.get(metric))) best = run;
  }
  return best;
}
