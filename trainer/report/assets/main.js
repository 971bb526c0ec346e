// The page: what it remembers (in the address, so that loading it again keeps it), its head, and its parts.
class Page {
  constructor(data) {
    this.data = data;
    this.focus = null;
    this.state = { metric: data.metrics[0] ?? "loss", axis: "step", logx: false, logy: false, smooth: data.runs.some((run) => (run.curves.get("loss")?.values.length ?? 0) > 150) ? 20 : 0, colour: repeated(data), sort: "", down: false, theme: "auto", hidden: [] };
    try { Object.assign(this.state, JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}")); } catch { /* another page's address */ }
    if (!data.metrics.includes(this.state.metric)) this.state.metric = data.metrics[0] ?? "loss";
    if (!data.fields.includes(this.state.colour)) this.state.colour = "";
    data.runs.forEach((run) => { run.hidden = Array.isArray(this.state.hidden) && this.state.hidden.includes(run.index); });
    this.theme(this.state.theme);
    this.colour = colours(data, this.state.colour);
    this.table = new RunTable(this);
    this.fields = new Fields(this);
    this.curves = new Curves(this);
    this.throughput = new Throughput(this);
    this.life = new LifeLines(this);
    this.parts = [this.curves, this.table, this.fields, this.throughput, this.life];
    this.head();
    document.getElementById("main").append(...this.parts.map((part) => part.node));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawAll());
    this.drawAll();
    if (data.reload) setTimeout(() => location.reload(), data.reload * 1000);
  }

  head() {
    const { data } = this, count = new Map();
    data.runs.forEach((run) => count.set(run.status, (count.get(run.status) ?? 0) + 1));
    const best = bestRun(data, data.result), states = [...count].map(([status, n]) => `${n} ${status}`).join(", ");
    const single = data.runs.length === 1;
    fill(document.getElementById("head"), {}, [element("h1", {}, data.title),
      element("span", { class: "soft" }, single ? `${data.runs[0].status}, step ${data.runs[0].step}` : `${data.runs.length} runs: ${states}`),
      best ? element("span", { id: "best" }, single ? `last ${data.result} ` : `best ${data.result} `, element("b", {}, exact(best.last.get(data.result))), single ? "" : ` ${this.label(best)}`) : null,
      element("span", { class: "grow" }),
      choice("theme", [["auto", "auto"], ["light", "light"], ["dark", "dark"]], this.state.theme, (t) => { this.state.theme = t; this.theme(t); this.save(); this.drawAll(); })]);
    document.getElementById("foot").append(`Made ${moment(data.made)}. Time is that of the steps; FLOPs are those of the model's forward and backward passes, without recomputation. Read-outs on curves have six digits. This page sends nothing and loads nothing.`);
  }

  theme(name) {
    if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
  }

  // The fields tell runs of a sweep apart; where they do not, the name does.
  label(run) {
    if (!this.labels) {
      const told = this.data.runs.map((r) => this.data.fields.map((f) => `${f.split(".").at(-1)} ${number(r.fields.get(f) ?? "none")}`).join(", "));
      this.labels = new Set(told).size === told.length && this.data.fields.length ? told : this.data.runs.map((r) => r.name);
    }
    return this.labels[run.index];
  }

  setFocus(index) {
    if (this.focus === index) return;
    this.focus = index;
    this.curves.draw();
    this.fields.draw();
  }

  save() {
    this.state.hidden = this.data.runs.filter((run) => run.hidden).map((run) => run.index);
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(this.state))}`);
  }

  drawAll() {
    this.colour = colours(this.data, this.state.colour);
    this.parts.forEach((part) => part.draw());
  }
}

// Runs that differ by their seed alone look alike, unless told otherwise.
function repeated(data) {
  return data.fields.includes("seed") ? data.fields.find((f) => f !== "seed") ?? "" : "";
}

unpack().then((data) => { globalThis.page = new Page(data); document.documentElement.dataset.ready = "true"; });
