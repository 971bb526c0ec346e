// The runs, sorted as asked; it is the curves' legend too.
class RunTable {
  constructor(page) {
    this.page = page;
    this.head = element("tr");
    this.body = element("tbody");
    this.node = element("section", { id: "runs" },
      element("div", { class: "bar" }, element("h2", {}, "Runs"),
        element("span", { class: "soft" }, "sort by a heading; a click on a dot hides a curve")),
      element("div", { class: "scroll" }, element("table", {}, element("thead", {}, this.head), this.body)));
  }

  columns() {
    const { data, state } = this.page, has = (name) => data.runs.some((run) => run.last.has(name));
    const measures = [...new Set([data.result, "loss", "val_loss", state.metric])].filter(has);
    return [
      { key: "name", text: "run", of: (run) => run.name },
      ...data.fields.map((f) => ({ key: `field:${f}`, text: f, of: (run) => run.fields.get(f) })),
      { key: "status", text: "status", of: (run) => run.status },
      { key: "step", text: "step", of: (run) => run.step, number: true },
      ...measures.map((m) => ({ key: `last:${m}`, text: m, of: (run) => run.last.get(m), number: true, exact: true })),
      ...["tokens_per_s", "mfu"].filter((m) => data.runs.some((run) => run.median.has(m))).map((m) => ({
        key: `median:${m}`, text: m === "mfu" ? "MFU" : "tokens/s", of: (run) => run.median.get(m), number: true })),
      { key: "starts", text: "starts", of: (run) => run.starts, number: true },
      { key: "lost", text: "lost", of: (run) => run.lost, number: true, show: (v) => (v ? seconds(v) : "") },
    ];
  }

  draw() {
    const { data, state, colour } = this.page, columns = this.columns();
    const sorted = columns.find((c) => c.key === state.sort) ?? columns.find((c) => c.key === `last:${data.result}`) ?? columns[0];
    this.head.replaceChildren(element("th"), ...columns.map((c) => element("th", {
      class: c.number ? "number" : null, "aria-sort": c === sorted ? (state.down ? "descending" : "ascending") : null, "data-key": c.key,
    }, element("button", { type: "button", onclick: () => this.sort(c, sorted) }, c.text))));
    const runs = [...data.runs].sort((a, b) => compare(sorted.of(a), sorted.of(b), state.down) || a.index - b.index);
    const best = data.runs.length > 1 ? bestRun(data, data.result) : null;
    this.body.replaceChildren(...runs.map((run) => this.row(run, columns, colour[run.index], run === best)));
  }

  row(run, columns, colour, isBest) {
    const { page } = this, row = element("tr", {
      class: `${isBest ? "best" : ""} ${run.hidden ? "hidden-run" : ""}`, "data-run": run.name,
      onpointerenter: () => page.setFocus(run.index), onpointerleave: () => page.setFocus(null),
    });
    const dot = element("button", {
      class: "dot", type: "button", title: "show or hide its curve", "aria-pressed": String(!run.hidden),
      onclick: () => { run.hidden = !run.hidden; page.save(); page.drawAll(); },
    });
    dot.style.cssText = `background:${run.hidden ? "transparent" : colour};border:2px solid ${colour};padding:0;cursor:pointer;width:12px;height:12px;border-radius:6px`;
    row.append(element("td", {}, dot), ...columns.map((c) => {
      const value = c.of(run), text = c.show ? c.show(value) : c.exact && typeof value === "number" ? exact(value) : number(value);
      if (c.key === "name") {
        return element("td", { class: "run", title: run.name }, isBest ? element("span", { class: "star", title: `best ${page.data.result}` }, "★ ") : null, run.name);
      }
      if (c.key === "status") return element("td", { class: `state ${stateClass(run.status)}` }, text);
      if (c.key === "step" && run.steps) return element("td", { class: "number" }, `${run.step} / ${run.steps}`);
      return element("td", { class: c.number ? "number" : null, title: typeof value === "number" ? String(value) : null }, text);
    }));
    return row;
  }

  sort(column, sorted) {
    const { state } = this.page;
    state.down = column === sorted ? !state.down : false;
    state.sort = column.key;
    this.page.save();
    this.draw();
  }
}

function exact(value) {
  return Math.abs(value) < 1e4 && Math.abs(value) >= 1e-3 ? value.toFixed(4) : number(value);
}

function stateClass(status) {
  return ["finished", "running", "failed", "damaged", "killed", "stopped", "terminated", "preempted"].includes(status) ? status : "other";
}

// What is missing comes last, whichever way; numbers before words.
function compare(a, b, down) {
  const missing = (v) => v === undefined || v === null || v === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "number" && typeof b === "number" ? a - b
    : typeof a === "number" ? -1 : typeof b === "number" ? 1 : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -order : order;
}
