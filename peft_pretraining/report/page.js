"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  // What is shown. Several hundred runs are too many at once: then the best rate of each method.
  const hidden = new Set();
  const showAll = () => hidden.clear();
  const showBest = () => data.series.forEach((one, i) => (one.best ? hidden.delete(i) : hidden.add(i)));
  if (data.series.length > data.most_shown) showBest();

  // Light and dark.
  const dark = () => root.dataset.theme === "dark";
  const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (name) => {
    root.dataset.theme = name;
    by("theme").textContent = dark() ? "Light" : "Dark";
  };
  setTheme(stored() || (prefers.matches ? "dark" : "light"));
  const colour = (style) => (dark() ? data.dark : data.light)[style.colour];

  // Plotly reads names as HTML of its own.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const fade = (hex, share) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join()},${share})`;
  const looks = (one) => ({
    line: { color: colour(one.style), width: 2, dash: data.dashes[one.style.dash] },
    marker: { color: colour(one.style), symbol: data.markers[one.style.marker], size: 7 },
  });

  // One series in a chart: a band over the seeds, the training's own perplexity, the line itself.
  const curve = (index, x) => {
    const one = data.series[index], found = [], shown = !hidden.has(index);
    const common = { visible: shown, legendgroup: String(index), name: plain(one.label), meta: index };
    const xs = one.curve.map((point) => point[x]);
    if (one.curve.some((point) => point.count > 1)) {
      const edge = { ...common, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      found.push({ ...edge, x: xs, y: one.curve.map((p) => p.low) });
      found.push({ ...edge, x: xs, y: one.curve.map((p) => p.high), fill: "tonexty", fillcolor: fade(colour(one.style), 0.2) });
    }
    if (by("training").checked && one.training.length) {
      const k = x === "tokens" ? 0 : 1;
      found.push({
        ...common, mode: "lines", x: one.training.map((p) => p[k]), y: one.training.map((p) => Math.exp(Math.min(p[2], 700))),
        line: { color: fade(colour(one.style), 0.5), width: 1 },
        hovertemplate: "<b>%{fullData.name}</b><br>training perplexity %{y:.2f}<br>at %{x:.3s}<extra></extra>",
      });
    }
    const unit = x === "tokens" ? "tokens" : "s";
    found.push({
      ...common, ...looks(one), mode: "lines+markers", x: xs, y: one.curve.map((p) => p.perplexity),
      customdata: one.curve.map((p) => (p.count > 1 ? `mean of ${p.count} seeds, ${p.low.toFixed(2)} to ${p.high.toFixed(2)}<br>` : "")),
      hovertemplate: `<b>%{fullData.name}</b><br>perplexity %{y:.2f}<br>%{customdata}%{x:.4s} ${unit}<extra></extra>`,
    });
    return found;
  };
  const all = data.series.map((_, index) => index);
  const charts = {
    tokens: { title: "Validation perplexity over tokens", x: "tokens", y: "perplexity", log: [false, true],
      traces: () => all.flatMap((i) => curve(i, "tokens")) },
    time: { title: "Validation perplexity over training time", x: "training time (s)", y: "perplexity", log: [false, true],
      traces: () => all.flatMap((i) => curve(i, "seconds")) },
    state: { title: "Last perplexity over optimizer state", x: "optimizer state (MB)", y: "last perplexity", log: [false, false],
      traces: () => all.filter((i) => data.series[i].state !== null && data.series[i].final !== null).map((i) => {
        const one = data.series[i], looked = looks(one);
        return {
          visible: !hidden.has(i), name: plain(one.label), meta: i, mode: "markers", x: [one.state], y: [one.final.mean],
          marker: { ...looked.marker, symbol: looked.marker.symbol + (one.style.dash ? "-open" : ""), size: 11, line: one.style.dash ? { width: 2 } : { width: 1, color: dark() ? "#1a2029" : "#ffffff" } },
          error_y: { type: "data", symmetric: false, array: [one.final.high - one.final.mean],
            arrayminus: [one.final.mean - one.final.low], visible: one.final.count > 1, color: colour(one.style), thickness: 1.2 },
          hovertemplate: "<b>%{fullData.name}</b><br>perplexity %{y:.2f}<br>%{x:.2f} MB<extra></extra>",
        };
      }) },
    rate: { title: "Last perplexity over the learning rate", x: "peak learning rate", y: "last perplexity", log: [true, true],
      traces: () => data.sweeps.map((sweep) => ({
        visible: sweep.members.some((i) => !hidden.has(i)), name: plain(sweep.label), meta: sweep.members, mode: "lines+markers",
        x: sweep.rates, y: sweep.perplexities, ...looks(data.series[sweep.members.find((i) => data.series[i].best) ?? sweep.members[0]]),
        hovertemplate: "<b>%{fullData.name}</b><br>perplexity %{y:.2f}<br>rate %{x:.3~g}<extra></extra>",
      })) },
  };
  const axis = (title, log, span) => {
    const format = title === "tokens" ? "~s" : ",~g";
    const line = getComputedStyle(root).getPropertyValue("--line"), grid = getComputedStyle(root).getPropertyValue("--grid");
    return { title: { text: title, standoff: 8 }, type: log ? "log" : "linear", gridcolor: grid, linecolor: line, zeroline: false,
      automargin: true, showline: true, ...(log ? { exponentformat: "power", minor: { ticks: "outside", ticklen: 3, tickcolor: line } } : { exponentformat: "SI" }),
      ...(log && span > 2.2 ? { dtick: 1 } : log && span > 0.6 ? { dtick: "D2", tickformat: format } : log ? { nticks: 7, tickformat: format } : { nticks: 7 }) };
  };
  // In decades: more than two have ticks at the powers of ten alone, fewer at 1, 2 and 5.
  const decades = (traces, letter) => {
    const values = traces.filter((trace) => trace.visible).flatMap((trace) => trace[letter]).filter((value) => value > 0);
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
    return values.length ? Math.log10(high / low) : 0;
  };
  // By name: among plotly's own there is one that uploads the plot.
  const buttons = (name) => [
    [{ name: "image", title: "Download as PNG", icon: Plotly.Icons.camera,
      click: (plot) => Plotly.downloadImage(plot, { format: "png", scale: 2, filename: `perplexity_over_${name}` }) }],
    ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"],
  ];
  const draw = (name) => {
    const chart = charts[name], style = getComputedStyle(root);
    const clear = "rgba(0,0,0,0)";
    const traces = chart.traces();
    return Plotly.react(chart.plot, traces, {
      paper_bgcolor: clear, plot_bgcolor: clear, showlegend: false, margin: { l: 58, r: 14, t: 12, b: 46 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style.getPropertyValue("--ink").trim() },
      hoverlabel: { bgcolor: style.getPropertyValue("--card").trim(), bordercolor: style.getPropertyValue("--line").trim(),
        font: { color: style.getPropertyValue("--ink").trim() }, align: "left" },
      modebar: { bgcolor: clear, color: style.getPropertyValue("--soft").trim(), activecolor: style.getPropertyValue("--accent").trim() },
      hovermode: "closest", uirevision: chart.log.join(), xaxis: axis(chart.x, chart.log[0], decades(traces, "x")), yaxis: axis(chart.y, chart.log[1], decades(traces, "y")),
    }, { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtons: buttons(name) });
  };
  const drawAll = () => Promise.all(Object.keys(charts).map(draw));
  for (const [name, chart] of Object.entries(charts)) {
    if (!chart.traces().length) { delete charts[name]; continue; }
    const bar = make("div", { class: "bar" }, make("h3", {}, chart.title));
    ["x", "y"].forEach((letter, which) => {
      const button = make("button", { type: "button", class: "axis", "aria-pressed": chart.log[which], "data-axis": letter }, `log ${letter}`);
      button.addEventListener("click", () => {
        chart.log[which] = !chart.log[which];
        button.setAttribute("aria-pressed", chart.log[which]);
        draw(name);
      });
      bar.append(button);
    });
    chart.plot = make("div", { class: "plot", id: `plot-${name}` });
    by("charts").append(make("section", { class: "chart" }, bar, chart.plot));
  }

  // The legend, of all charts.
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const shapes = ["M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z", "M-3.6,-3.6h7.2v7.2h-7.2Z", "M0,-4.4L4.4,3.6H-4.4Z", "M0,-5L5,0L0,5L-5,0Z",
    "M0,4.4L4.4,-3.6H-4.4Z", "M-4,-2L-2,-4L0,-2L2,-4L4,-2L2,0L4,2L2,4L0,2L-2,4L-4,2L-2,0Z", "M-1.6,-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4Z"];
  const strokes = ["", "6 3", "2 2", "6 2 2 2"];
  const swatch = (style) => {
    const found = svg("svg", { class: "swatch", viewBox: "0 0 30 12", "aria-hidden": "true" });
    found.append(
      svg("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: colour(style), "stroke-width": 2, "stroke-dasharray": strokes[style.dash] }),
      svg("path", { d: shapes[style.marker], transform: "translate(15 6)", fill: colour(style) }),
    );
    return found;
  };
  const items = data.series.map((one, index) => {
    const button = make("button", { type: "button", title: `${one.folders}\nclick: show or hide; double click: this one alone` }, make("span", {}, one.name));
    button.addEventListener("click", () => { hidden.has(index) ? hidden.delete(index) : hidden.add(index); show(); });
    button.addEventListener("dblclick", () => { all.forEach((i) => hidden.add(i)); hidden.delete(index); show(); });
    return button;
  });
  // Of many, those that are shown at first stand first.
  const order = data.series.length > data.most_shown ? [...all].sort((a, b) => data.series[b].best - data.series[a].best) : all;
  by("legend").append(...order.map((index) => make("li", {}, items[index])));
  const paintSwatches = () => items.forEach((button, index) => {
    button.querySelector("svg")?.remove();
    button.prepend(swatch(data.series[index].style));
  });

  // The settings of what is shown.
  const unimportant = new Set(data.unimportant);
  const showSettings = () => {
    const shown = all.filter((i) => !hidden.has(i)), wanted = by("find-setting").value.toLowerCase();
    const head = make("tr", {}, make("th", { scope: "col" }, "setting"), ...shown.map((i) => make("th", { scope: "col" }, data.series[i].name)));
    const rows = [];
    data.settings.forEach((name, k) => {
      const values = shown.map((i) => data.series[i].settings[k]);
      const differs = new Set(values).size > 1 && !unimportant.has(name);
      if ((by("differing").checked && !differs) || !name.toLowerCase().includes(wanted)) return;
      const counts = new Map();
      values.forEach((value) => counts.set(value, (counts.get(value) || 0) + 1));
      const usual = [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
      const cells = values.map((value) => make("td", differs && value !== usual ? { class: "other" } : {}, value));
      rows.push(make("tr", differs ? { class: "differs" } : {}, make("th", { scope: "row" }, name), ...cells));
    });
    const empty = make("tr", {}, make("td", { colspan: shown.length + 1 }, shown.length > 1 ? "no such setting differs" : "no such setting"));
    by("settings").tHead.replaceChildren(head);
    by("settings").tBodies[0].replaceChildren(...(rows.length ? rows : [empty]));
  };

  const show = () => {
    items.forEach((button, index) => button.setAttribute("aria-pressed", !hidden.has(index)));
    showSettings();
    return drawAll();
  };

  // The table.
  const table = by("table"), body = table.tBodies[0];
  const number = (cell) => (cell.dataset.value === undefined || cell.dataset.value === "" ? null : Number(cell.dataset.value));
  const compare = (a, b, numeric, sign) => {
    if (!numeric) return sign * a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
    const [x, y] = [number(a), number(b)];
    return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);  // what is not known stays below
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    [...table.tHead.rows[0].cells].forEach((cell) => cell.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const numeric = head.classList.contains("number");
    body.append(...[...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], numeric, sign)));
  }));
  const showRows = () => {
    const wanted = by("find").value.toLowerCase(), single = by("every").checked;
    for (const row of body.rows) {
      const kind = row.dataset.kind === "both" || (row.dataset.kind === "one") === single;
      row.hidden = !kind || !row.textContent.toLowerCase().includes(wanted);
      row.classList.toggle("one", row.dataset.kind === "one");
    }
  };

  const retheme = () => { paintSwatches(); drawAll(); };
  by("theme").addEventListener("click", () => {
    setTheme(dark() ? "light" : "dark");
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a page from disk may keep nothing */ }
    retheme();
  });
  prefers.addEventListener("change", () => { if (!stored()) { setTheme(prefers.matches ? "dark" : "light"); retheme(); } });
  by("show-all").addEventListener("click", () => { showAll(); show(); });
  by("show-none").addEventListener("click", () => { all.forEach((i) => hidden.add(i)); show(); });
  by("show-best").addEventListener("click", () => { showBest(); show(); });
  by("show-best").hidden = data.series.every((one) => one.best);
  by("training").checked = data.show_training;
  by("training").addEventListener("change", drawAll);
  by("every")?.addEventListener("change", showRows);
  by("find").addEventListener("input", showRows);
  by("differing").addEventListener("change", showSettings);
  by("find-setting").addEventListener("input", showSettings);
  by("differing").checked = data.series.length > 1;

  showRows();
  paintSwatches();
  show().then(() => { root.dataset.ready = "yes"; });
})();
