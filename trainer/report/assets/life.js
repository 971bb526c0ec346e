// What happened to each run: its starts beside each other, and, opened, each start by its steps.
const MARKS = { kept: "kept", pruned: "pruned", incomplete: "incomplete", failed: "failed-save", "set aside": "aside", damaged: "incomplete" };

class LifeLines {
  constructor(page) {
    this.page = page;
    this.rows = element("div");
    const sample = (kind, text) => element("span", {}, svg("svg", {}, svg("circle", { class: kind, cx: 7, cy: 7, r: 3.5 })), text);
    const stretch = (kind, text) => element("span", {}, svg("svg", { class: kind }, svg("rect", { class: "start", x: 0, y: 2, width: 14, height: 10 })), text);
    this.node = element("section", { id: "life" }, element("div", { class: "bar" }, element("h2", {}, "Life lines"),
      element("span", { class: "soft" }, "by the clock from the first start on, long pauses cut short; open a run for its starts")),
    element("div", { class: "legend" }, stretch("finished", "finished"), stretch("running", "running"), stretch("stopped", "stopped or preempted"),
      stretch("killed", "killed or failed"), sample("kept", "snapshot kept"), sample("pruned", "removed by retention"),
      sample("aside", "set aside"), sample("incomplete", "not committed"), sample("resumed", "resumed from")), this.rows);
    const many = [...page.data.runs].sort((a, b) => b.starts - a.starts)[0];
    this.open = new Set(many && (many.starts > 1 || page.data.runs.length === 1) ? [many.index] : []);
  }

  draw() {
    const runs = this.page.data.runs.filter((run) => run.life && run.starts);
    this.node.hidden = !runs.length;
    const spans = new Map(runs.map((run) => [run.index, spread(run.life.starts)]));
    const longest = Math.max(...[...spans.values()].map((s) => s.total), 1e-9);
    this.rows.replaceChildren(...runs.flatMap((run) => this.run(run, spans.get(run.index), longest)));
  }

  run(run, span, longest) {
    const open = this.open.has(run.index);
    const row = element("button", {
      class: "life-row", type: "button", "aria-expanded": String(open), "data-life": run.name,
      onclick: () => { if (open) this.open.delete(run.index); else this.open.add(run.index); this.draw(); },
    }, element("span", { class: "name", title: run.name }, `${open ? "▾" : "▸"} ${this.page.label(run)}`), this.line(run, span, longest),
    element("span", { class: "lost" }, run.lost ? `lost ${seconds(run.lost)}` : run.starts > 1 ? "lost nothing" : ""));
    return open ? [row, this.detail(run)] : [row];
  }

  line(run, span, longest) {
    const at = (seconds_) => `${(100 * seconds_) / longest}%`, parts = [];
    run.life.starts.forEach((start, n) => {
      const { left, wide } = span.places[n], group = svg("g", { class: start.how });
      if (n) parts.push(svg("line", { class: "gap", x1: at(span.places[n - 1].left + span.places[n - 1].wide), x2: at(left), y1: 10, y2: 10 }));
      group.append(
        svg("rect", { class: "start", x: at(left), y: 3, width: at(wide), height: 14 }, svg("title", {}, told(start, n))),
        svg("line", { class: "start-edge", x1: at(left + wide), x2: at(left + wide), y1: 2, y2: 18 }));
      parts.push(group);
    });
    for (const s of run.life.snapshots) {
      const start = run.life.starts[s.start], { left, wide } = span.places[s.start], length = start.ended - start.began || 1;
      const when = s.committed || s.staged || start.ended, part = Math.min(1, Math.max(0, (when - start.began) / length));
      parts.push(mark(s, at(left + part * wide), 10, 2.6));
    }
    return svg("svg", { height: 20 }, ...parts);
  }

  detail(run) {
    const { life } = run, columns = ["start", "began", "took", "steps", "layout", "where", "ended", "newest saved"];
    return element("div", { class: "detail", "data-detail": run.name }, this.staircase(run),
      element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...columns.map((c) => element("th", {}, c)))),
        element("tbody", {}, ...life.starts.map((s, n) => element("tr", { class: s.how },
          element("td", {}, String(n + 1)), element("td", {}, moment(s.began)), element("td", {}, seconds(Math.max(0, s.ended - s.began))),
          element("td", {}, `${s.from_step} → ${s.to_step}`), element("td", {}, s.layout),
          element("td", {}, [s.host, s.job && `job ${s.job}`].filter(Boolean).join(", ")),
          element("td", { class: "state" }, s.how, s.error ? `: ${s.error}` : ""), element("td", {}, s.saved_step ? `step ${s.saved_step}` : "none")))))),
      element("h3", {}, "Snapshots"), element("div", {}, counted(life)),
      life.starts.length > 1 ? element("div", {}, lostInWords(life)) : null,
      life.lineages.length > 1 ? element("h3", {}, "Lines of steps") : null,
      life.lineages.length > 1 ? element("div", { class: "tree" }, tree(life.lineages)) : null,
      element("h3", {}, "Mesh"), ...meshes(life.starts));
  }

  staircase(run) {
    const { starts, snapshots } = run.life, last = Math.max(1, run.steps ?? 0, ...starts.map((s) => s.to_step)), tall = 18;
    const at = (step) => `${2 + (94 * step) / last}%`;
    return svg("svg", { height: starts.length * tall + 22, "data-chart": "staircase" },
      ...ticks(0, last, 8).filter(Number.isInteger).flatMap((v) => [svg("line", { class: "gridline", x1: at(v), x2: at(v), y1: 0, y2: starts.length * tall }),
        svg("text", { x: at(v), y: starts.length * tall + 14, "text-anchor": "middle" }, number(v))]),
      ...starts.map((s, n) => svg("g", { class: s.how }, svg("rect", { class: "start", x: at(s.from_step), y: n * tall + 3, width: `${(94 * Math.max(0, s.to_step - s.from_step)) / last}%`, height: 12 }, svg("title", {}, told(s, n))),
        svg("line", { class: "start-edge", x1: at(s.to_step), x2: at(s.to_step), y1: n * tall + 2, y2: n * tall + 16 }))),
      ...snapshots.map((s) => mark(s, at(s.step), s.start * tall + 9, 3.2)),
      svg("text", { x: "100%", y: starts.length * tall + 14, "text-anchor": "end" }, "step"));
  }
}

// Where each start stands on the line, in seconds; a pause takes no more than a part of what was worked.
function spread(starts) {
  const worked = starts.reduce((sum, s) => sum + Math.max(0, s.ended - s.began), 0) || 1, places = [];
  let at = 0;
  starts.forEach((s, n) => {
    if (n) at += Math.min(Math.max(0, s.began - starts[n - 1].ended), worked * 0.12);
    const wide = Math.max(s.ended - s.began, worked * 0.005);
    places.push({ left: at, wide });
    at += wide;
  });
  return { places, total: at };
}

function mark(s, x, y, r) {
  const words = [`step ${s.step}: ${s.state}`, s.staged && `staged ${moment(s.staged)}`, s.committed && `committed ${moment(s.committed)}`,
    s.seconds && `took ${seconds(s.seconds)}`, s.pruned && `removed ${moment(s.pruned)}`, s.resumed && `resumed from ${s.resumed === 1 ? "once" : `${s.resumed} times`}`];
  return svg("circle", { class: s.resumed ? "resumed" : MARKS[s.state] ?? "pruned", cx: x, cy: y, r }, svg("title", {}, words.filter(Boolean).join("\n")));
}

function told(s, n) {
  return `start ${n + 1}, ${moment(s.began)}: step ${s.from_step} to ${s.to_step}, ${s.how}\n${s.layout} on ${s.host}`;
}

function counted(life) {
  const all = Object.values(life.counts).reduce((a, b) => a + b, 0);
  if (!all) return "None that the run's files tell of.";
  const took = life.snapshots.map((s) => s.seconds).filter((s) => s > 0).sort((a, b) => a - b);
  const words = Object.entries(life.counts).map(([state, n]) => `${n} ${{ pruned: "removed by retention", incomplete: "not committed" }[state] ?? state}`);
  return `${all} in all: ${words.join(", ")}.${took.length ? ` Durable after ${seconds(took[took.length >> 1])} (median).` : ""}`;
}

function lostInWords(life) {
  const { down_s, again_steps, again_s } = life.lost;
  return `Between starts ${seconds(down_s)} passed; ${again_steps || "no"} steps were trained a second time${again_steps ? ` (${seconds(again_s)})` : ""}.`;
}

function tree(lineages) {
  const below = (parent) => lineages.filter((l) => (l.origin === "step" ? l.parent : null) === parent);
  const words = (l) => `${l.id}: ${{ fresh: "fresh weights", initial: "initial load", step: `goes on from step ${l.step} of ${l.parent}` }[l.origin]}${l.asked ? ` (${l.asked})` : ""}${l.current ? "  ← the run as it stands" : ""}`;
  const lines = [];
  const walk = (l, before, branch) => {
    lines.push(before + branch + words(l));
    const own = below(l.id), inner = before + { "": "", "├─ ": "│  ", "└─ ": "   " }[branch];
    own.forEach((child, n) => walk(child, inner, n < own.length - 1 ? "├─ " : "└─ "));
  };
  below(null).forEach((l) => walk(l, "", ""));
  return lines.join("\n");
}

// Each layout that the run had, with the coordinates of its ranks where they can be taken in.
function meshes(starts) {
  const seen = new Map();
  starts.forEach((s, n) => seen.set(s.layout, [...(seen.get(s.layout) ?? []), n + 1]));
  return [...seen].map(([layout, numbers]) => {
    const { degrees, ranks } = starts[numbers[0] - 1], axes = ["pp", "dp_replicate", "dp_shard", "cp", "tp"].filter((a) => (degrees[a] ?? 1) > 1);
    const boxes = ranks > 1 && ranks <= 64 ? Array.from({ length: ranks }, (_, rank) => {
      let rest = rank;
      const at = [...axes].reverse().map((a) => { const c = rest % degrees[a]; rest = Math.floor(rest / degrees[a]); return `${a} ${c}`; });
      return element("div", {}, `${rank}: ${at.reverse().join(" · ")}`);
    }) : [];
    return element("div", {}, element("div", {}, `${layout}${ranks > 1 ? ` (${ranks} ranks)` : ""}, start ${numbers.join(", ")}`), element("div", { class: "ranks" }, ...boxes));
  });
}
