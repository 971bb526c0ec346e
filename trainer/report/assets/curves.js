// All runs' curves of one measure, one over the other.
class Curves {
  constructor(page) {
    this.page = page;
    this.near = null;
    this.zoom = null;
    this.dragging = null;
    const { data, state } = page, redraw = () => { this.zoom = null; page.save(); this.draw(); };
    const set = (name) => (value) => { state[name] = value; redraw(); };
    this.canvas = element("canvas", { "aria-label": "curves of all runs" });
    this.tip = element("div", { class: "tip" });
    this.plot = element("div", { class: "plot" }, this.canvas, this.tip);
    const smooth = element("input", {
      type: "range", min: 0, max: 100, value: state.smooth, "data-range": "smoothing",
      oninput: () => { state.smooth = Number(smooth.value); page.save(); this.draw(); },
    });
    const axes = AXES.filter(([axis]) => axis === "step" || data.runs.some((run) => place(run, axis, run.step) !== null));
    this.node = element("section", { id: "curves" },
      element("div", { class: "bar" },
        element("h2", {}, "Curves"),
        select("measure", data.metrics.map((m) => [m, m]), state.metric, (m) => { state.metric = m; redraw(); page.table.draw(); page.fields.draw(); }),
        element("label", {}, "against", choice("axis", axes, state.axis, set("axis"))),
        element("label", {}, "log", onOff("x", state.logx, set("logx")), onOff("y", state.logy, set("logy"))),
        element("label", {}, "smoothing", smooth),
        data.fields.length ? select("colour by", [["", "run"], ...data.fields.map((f) => [f, f])], state.colour, (f) => { state.colour = f; page.save(); page.drawAll(); }) : null),
      this.plot,
      element("div", { class: "soft" }, page.data.points ? `Of each curve ${page.data.points} points are drawn at most; the lowest and the highest value of each stretch are among them. ` : "", "Drag to zoom, double-click to see all."));
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", () => { this.near = null; this.tip.style.display = "none"; this.draw(); });
    this.plot.addEventListener("pointerdown", (event) => { this.dragging = this.inside(event).u; });
    this.plot.addEventListener("pointerup", (event) => this.release(event));
    this.plot.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  lines() {
    const { data, state, colour } = this.page, lines = [];
    for (const run of data.runs) {
      const curve = run.curves.get(state.metric);
      if (!curve || run.hidden) continue;
      const points = [];
      for (let n = 0; n < curve.steps.length; n++) {
        const x = place(run, state.axis, curve.steps[n]), y = curve.values[n];
        if (x !== null && !(state.logx && x <= 0) && !(state.logy && y <= 0)) points.push({ x, y, step: curve.steps[n] });
      }
      if (points.length) lines.push({ run, points, colour: colour[run.index] });
    }
    const right = Math.max(...lines.map((l) => l.points[l.points.length - 1].x));
    lines.forEach((line) => { line.smooth = this.smoothed(line.points, right); });
    return lines;
  }

  // An exponential mean over a stretch of the axis, without the pull of its first value.
  smoothed(points, right) {
    const reach = (this.page.state.smooth / 100) ** 2 * 0.25 * (right - points[0].x);
    if (!(reach > 0)) return points;
    let sum = 0, weight = 0, before = points[0].x;
    return points.map((p) => {
      const kept = Math.exp(-(p.x - before) / reach);
      sum = sum * kept + p.y; weight = weight * kept + 1; before = p.x;
      return { x: p.x, y: sum / weight, step: p.step };
    });
  }

  draw() {
    const { state } = this.page, box = this.plot.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    if (!box.width) return;
    this.canvas.width = box.width * ratio; this.canvas.height = box.height * ratio;
    const g = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    g.scale(ratio, ratio);
    this.box = { left: 62, top: 8, width: box.width - 74, height: box.height - 44 };
    this.drawn = this.lines();
    g.font = "11px system-ui, sans-serif"; g.fillStyle = style.getPropertyValue("--soft");
    if (!this.drawn.length) { g.fillText("no run has this measure against this axis", 70, 40); return; }
    this.scales();
    this.grid(g, style);
    g.save(); g.beginPath(); g.rect(this.box.left, this.box.top - 2, this.box.width, this.box.height + 4); g.clip();
    g.lineJoin = "round";
    const focus = this.near ?? this.page.focus;
    for (const line of this.drawn) {
      const dim = focus !== null && focus !== line.run.index;
      if (state.smooth > 0) this.path(g, line.points, line.colour, 0.8, dim ? 0.06 : 0.22);
      this.path(g, line.smooth, line.colour, focus === line.run.index ? 2.6 : 1.4, dim ? 0.25 : 1);
      if (line.points.length < 40) this.dots(g, line, dim ? 0.25 : 1);
    }
    g.restore();
  }

  scales() {
    const { state } = this.page, xs = this.drawn.flatMap((l) => [l.points[0].x, l.points[l.points.length - 1].x]);
    const [left, right] = this.zoom ?? [Math.min(...xs), Math.max(...xs)];
    let low = Infinity, high = -Infinity;
    for (const line of this.drawn) {
      for (const p of state.smooth > 0 ? [...line.smooth, ...line.points] : line.points) {
        if (p.x >= left && p.x <= right) { low = Math.min(low, p.y); high = Math.max(high, p.y); }
      }
    }
    if (!(low <= high)) { low = 0; high = 1; }
    this.x = scale(left, right, state.logx && left > 0);
    this.y = state.logy && low > 0 ? scale(low / 1.02, high * 1.02, true) : scale(low - (high - low) * 0.03, high + (high - low) * 0.03, false);
  }

  grid(g, style) {
    const { left, top, width, height } = this.box, { state } = this.page;
    g.strokeStyle = style.getPropertyValue("--grid"); g.lineWidth = 1;
    g.textAlign = "right"; g.textBaseline = "middle";
    for (const v of this.y.ticks(6)) {
      const at = top + height * (1 - this.y.at(v));
      g.beginPath(); g.moveTo(left, at); g.lineTo(left + width, at); g.stroke(); g.fillText(number(v), left - 6, at);
    }
    g.textAlign = "center"; g.textBaseline = "top";
    for (const v of this.x.ticks(8)) {
      const at = left + width * this.x.at(v);
      g.beginPath(); g.moveTo(at, top); g.lineTo(at, top + height); g.stroke(); g.fillText(onAxis(state.axis, v), at, top + height + 5);
    }
    g.textAlign = "right";
    g.fillText(state.axis === "time" ? "time in steps" : state.axis === "flops" ? "FLOPs" : state.axis, left + width, top + height + 20);
  }

  at(p) {
    return [this.box.left + this.box.width * this.x.at(p.x), this.box.top + this.box.height * (1 - this.y.at(p.y))];
  }

  path(g, points, colour, width, opacity) {
    g.strokeStyle = colour; g.lineWidth = width; g.globalAlpha = opacity; g.beginPath();
    points.forEach((p, n) => { const [x, y] = this.at(p); if (n) g.lineTo(x, y); else g.moveTo(x, y); });
    g.stroke(); g.globalAlpha = 1;
  }

  dots(g, line, opacity) {
    g.fillStyle = line.colour; g.globalAlpha = opacity;
    for (const p of line.smooth) { const [x, y] = this.at(p); g.beginPath(); g.arc(x, y, 2.4, 0, 7); g.fill(); }
    g.globalAlpha = 1;
  }

  inside(event) {
    const box = this.plot.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    return { x, y, u: this.box ? (x - this.box.left) / this.box.width : 0 };
  }

  hover(event) {
    if (!this.drawn?.length) return;
    const { x, y, u } = this.inside(event), value = this.x.value(Math.min(1, Math.max(0, u))), rows = [];
    for (const line of this.drawn) {
      const points = line.smooth;
      let low = 0, high = points.length - 1;
      while (low < high) { const m = (low + high) >> 1; if (points[m].x < value) low = m + 1; else high = m; }
      const n = low > 0 && Math.abs(points[low - 1].x - value) < Math.abs(points[low].x - value) ? low - 1 : low;
      rows.push({ line, p: points[n], away: Math.abs(this.at(points[n])[1] - y) });
    }
    rows.sort((a, b) => a.away - b.away);
    this.near = rows[0].line.run.index;
    const shown = rows.slice(0, 8).sort((a, b) => b.p.y - a.p.y), { state } = this.page;
    this.tip.replaceChildren(...[
      element("div", { class: "soft" }, `${state.metric} at step ${rows[0].p.step}`, state.axis === "step" ? null : ` (${onAxis(state.axis, rows[0].p.x)})`),
      ...shown.map(({ line, p }) => element("div", { class: line.run.index === this.near ? "near" : "" },
        element("span", { class: "dot", color: line.colour }), element("span", { class: "name" }, this.page.label(line.run)),
        element("span", { class: "value" }, number(p.y)))),
      rows.length > shown.length ? element("div", { class: "soft" }, `and ${rows.length - shown.length} more`) : null,
    ].filter((child) => child !== null));
    this.tip.style.display = "block";
    const box = this.plot.getBoundingClientRect(), wide = this.tip.offsetWidth;
    this.tip.style.left = `${x + 18 + wide > box.width ? Math.max(0, x - wide - 18) : x + 18}px`;
    this.tip.style.top = `${Math.min(Math.max(0, y - 20), Math.max(0, box.height - this.tip.offsetHeight))}px`;
    this.draw();
  }

  release(event) {
    const from = this.dragging, { u } = this.inside(event);
    this.dragging = null;
    if (from === null || Math.abs(u - from) < 0.02 || !this.x) return;
    this.zoom = [Math.max(0, Math.min(from, u)), Math.min(1, Math.max(from, u))].map((part) => this.x.value(part));
    this.draw();
  }
}
