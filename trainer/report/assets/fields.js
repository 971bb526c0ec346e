// What swept fields do to the result: parallel coordinates, the result by each field, and throughput.
class Fields {
  constructor(page) {
    this.page = page;
    this.coordinates = element("div");
    this.effects = element("div", { class: "grid" });
    this.title = element("h2");
    this.node = element("section", { id: "fields" }, element("div", { class: "bar" }, this.title,
      element("span", { class: "soft" }, "every line is a run; below, a dot is a run, a bar the spread over seeds, a square their mean")),
    this.coordinates, this.effects);
    new ResizeObserver(() => this.draw()).observe(this.coordinates);
  }

  metric() {
    const { data, state } = this.page;
    return state.metric !== "loss" && data.runs.some((run) => run.last.has(state.metric)) ? state.metric : data.result;
  }

  draw() {
    const { data } = this.page, metric = this.metric(), runs = data.runs.filter((run) => run.last.has(metric));
    this.node.hidden = !data.fields.length || !runs.length;
    if (this.node.hidden) return;
    this.title.textContent = `Fields and last ${metric}`;
    this.coordinates.replaceChildren(this.parallel(runs, metric));
    const fields = data.fields.filter((f) => f !== "seed");
    this.effects.replaceChildren(...(fields.length ? fields : data.fields).map((f) => this.effect(f, runs, metric)));
  }

  parallel(runs, metric) {
    const { data, colour, focus } = this.page, width = this.coordinates.clientWidth || 900, height = 210;
    const axes = [...data.fields.map((f) => ({ text: f, of: (run) => run.fields.get(f) })), { text: `last ${metric}`, of: (run) => run.last.get(metric), result: true }];
    axes.forEach((axis, n) => {
      axis.x = 46 + n * ((width - 120) / Math.max(1, axes.length - 1));
      Object.assign(axis, fieldScale(runs.map(axis.of), axis.result));
    });
    const y = (axis, value) => 30 + (height - 48) * (1 - axis.at(value));
    const best = bestRun(data, metric);
    const lines = runs.map((run) => svg("polyline", {
      points: axes.map((axis) => `${axis.x},${y(axis, axis.of(run))}`).join(" "), fill: "none", stroke: colour[run.index],
      "stroke-width": run === best || focus === run.index ? 3 : 1.4, opacity: focus !== null && focus !== run.index ? 0.2 : 0.85,
    }, svg("title", {}, this.page.label(run))));
    return svg("svg", { height, viewBox: `0 0 ${width} ${height}`, "data-chart": "parallel" }, ...lines,
      ...axes.flatMap((axis) => [
        svg("line", { class: "axis", x1: axis.x, x2: axis.x, y1: 30, y2: height - 18 }),
        svg("text", { class: "strong", x: axis.x, y: 14, "text-anchor": axis === axes[0] ? "start" : axis.result ? "end" : "middle" }, axis.text),
        ...axis.marks.map((v) => svg("text", { x: axis.x + (axis.result ? 6 : -6), y: y(axis, v) + 4, "text-anchor": axis.result ? "start" : "end" }, number(v))),
      ]));
  }

  effect(field, runs, metric) {
    const { data, colour } = this.page, width = 320, height = 190, left = 48, bottom = height - 34;
    const values = [...new Set(runs.map((run) => run.fields.get(field)))].sort((a, b) => compare(a, b, false));
    const results = runs.map((run) => run.last.get(metric)), low = Math.min(...results), high = Math.max(...results);
    const y = scale(low - (high - low) * 0.08, high + (high - low) * 0.08, false);
    const up = (v) => 8 + (bottom - 8) * (1 - y.at(v)), slot = (width - left - 10) / values.length;
    const others = new Map();
    for (const run of runs) {
      const key = JSON.stringify(data.fields.filter((f) => f !== field && f !== "seed").map((f) => run.fields.get(f) ?? null));
      if (!others.has(key)) others.set(key, new Map());
      const by = others.get(key), value = run.fields.get(field);
      by.set(value, [...(by.get(value) ?? []), run]);
    }
    const marks = [], step = slot / (others.size + 1);
    [...others.values()].forEach((by, n) => {
      const means = values.map((value, m) => {
        const own = by.get(value);
        if (!own) return null;
        const x = left + m * slot + (n + 1) * step, found = own.map((run) => run.last.get(metric));
        const mean = found.reduce((a, b) => a + b, 0) / found.length;
        marks.push(svg("line", { x1: x, x2: x, y1: up(Math.min(...found)), y2: up(Math.max(...found)), stroke: "var(--soft)", "stroke-width": 1.5 }));
        own.forEach((run) => marks.push(svg("circle", { cx: x, cy: up(run.last.get(metric)), r: 3, fill: colour[run.index], opacity: 0.85 },
          svg("title", {}, `${this.page.label(run)}: ${exact(run.last.get(metric))}`))));
        marks.push(svg("rect", { x: x - 3, y: up(mean) - 3, width: 6, height: 6, fill: "none", stroke: "var(--text)" }, svg("title", {}, `mean of ${found.length}: ${exact(mean)}`)));
        return `${x},${up(mean)}`;
      }).filter((p) => p !== null);
      marks.unshift(svg("polyline", { points: means.join(" "), fill: "none", stroke: "var(--line)" }));
    });
    return element("div", { "data-effect": field }, element("h3", {}, `last ${metric} by ${field}`),
      svg("svg", { viewBox: `0 0 ${width} ${height}` },
        ...y.ticks(4).flatMap((v) => [svg("line", { class: "gridline", x1: left, x2: width - 10, y1: up(v), y2: up(v) }), svg("text", { x: left - 5, y: up(v) + 4, "text-anchor": "end" }, number(v))]),
        ...marks,
        ...values.map((v, m) => svg("text", { x: left + (m + 0.5) * slot, y: height - 16, "text-anchor": "middle" }, clipped(number(v ?? "none"), 18)))));
  }
}

function clipped(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

// Numbers stand where they are, by their logarithm where they span much; words stand at equal distances.
function fieldScale(values, isResult) {
  const different = [...new Set(values)].sort((a, b) => compare(a, b, false));
  if (different.every((v) => typeof v === "number") && (different.length > 1)) {
    const low = different[0], high = different[different.length - 1], own = scale(low, high, low > 0 && high / low >= 8);
    const all = different.length <= 8 && !isResult;
    return { at: own.at, marks: all ? different : [low, ...own.ticks(4).filter((v) => own.at(v) > 0.1 && own.at(v) < 0.9), high] };
  }
  return { at: (v) => (different.length > 1 ? different.indexOf(v) / (different.length - 1) : 0.5), marks: different };
}

class Throughput {
  constructor(page) {
    this.page = page;
    this.bars = element("div", { class: "bars" });
    this.node = element("section", { id: "throughput" }, element("div", { class: "bar" }, element("h2", {}, "Throughput"),
      element("span", { class: "soft" }, "median tokens per second, and how many ranks the last start had")), this.bars);
  }

  draw() {
    const { data, colour } = this.page, runs = data.runs.filter((run) => run.median.has("tokens_per_s"));
    const most = Math.max(...runs.map((run) => run.median.get("tokens_per_s")));
    this.node.hidden = !runs.length;
    this.bars.replaceChildren(...runs.flatMap((run) => {
      const value = run.median.get("tokens_per_s"), last = run.life?.starts.at(-1), fill = element("div", { class: "fill", color: colour[run.index] });
      fill.style.width = `${(100 * value) / most}%`;
      return [element("div", { class: "name", title: run.name }, this.page.label(run)), element("div", { title: last ? `${last.layout}, ${last.host}` : "" }, fill),
        element("div", { class: "value" }, `${number(value)}${last && last.ranks > 1 ? ` on ${last.ranks}` : ""}`)];
    }));
  }
}
