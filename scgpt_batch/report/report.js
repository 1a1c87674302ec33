"use strict";
// Maps of points on a canvas, and the panel of one gene. All text goes into the page as text, never as markup.
(() => {
  const MISSING = 255, LEVELS = 64;
  // Okabe and Ito, without black; the second list is for dark pages. After seven colours the shape changes.
  const COLOURS = {
    light: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800"],
    dark: ["#4aa8e0", "#e69f00", "#1fbf92", "#e29cc7", "#9ad4f5", "#f07a2e", "#f0e442"],
  };
  const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];
  // viridis, without the end that has no contrast on the page
  const VIRIDIS = [[68,1,84],[71,45,123],[59,82,139],[44,114,142],[33,145,140],[40,174,128],[94,201,98],[173,220,48],[253,231,37]];
  const RANGE = { light: [0.88, 0], dark: [0.22, 1] };

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const decode = (text, Type) => {
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    return new Type(bytes.buffer);
  };
  const number = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  const isDark = () => {
    const scheme = document.documentElement.style.colorScheme;
    return scheme ? scheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const themed = table => table[isDark() ? "dark" : "light"];
  const styled = name => {
    const probe = make("span", { style: `color: var(${name})` });
    document.body.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
  };
  const viridis = share => {
    const [low, high] = themed(RANGE), at = (low + (high - low) * share) * (VIRIDIS.length - 1);
    const i = Math.min(Math.floor(at), VIRIDIS.length - 2), rest = at - i;
    return `rgb(${VIRIDIS[i].map((c, k) => Math.round(c + (VIRIDIS[i + 1][k] - c) * rest)).join(",")})`;
  };

  const outline = (path, shape, x, y, r) => {
    if (shape === "circle") { path.moveTo(x + r, y); path.arc(x, y, r, 0, 2 * Math.PI); }
    else if (shape === "square") path.rect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
    else if (shape === "triangle") { path.moveTo(x, y - 1.25 * r); path.lineTo(x + 1.15 * r, y + 0.8 * r); path.lineTo(x - 1.15 * r, y + 0.8 * r); path.closePath(); }
    else if (shape === "diamond") { path.moveTo(x, y - 1.35 * r); path.lineTo(x + 1.1 * r, y); path.lineTo(x, y + 1.35 * r); path.lineTo(x - 1.1 * r, y); path.closePath(); }
    else { path.rect(x - 1.3 * r, y - 0.45 * r, 2.6 * r, 0.9 * r); path.rect(x - 0.45 * r, y - 1.3 * r, 0.9 * r, 2.6 * r); }
  };

  class PointMap {
    constructor(root, data) {
      Object.assign(this, { root, data, hidden: new Set(), view: { scale: 1, x: 0, y: 0 }, marked: [], chosen: -1 });
      const xy = decode(data.xy, Uint16Array);
      this.n = data.names.length;
      this.x = new Float32Array(this.n); this.y = new Float32Array(this.n);
      for (let i = 0; i < this.n; i++) { this.x[i] = xy[2 * i] / 65535; this.y[i] = 1 - xy[2 * i + 1] / 65535; }
      for (const column of data.columns) column.bytes = decode(column.values, Uint8Array);
      this.canvas = root.querySelector("canvas"); this.tip = root.querySelector(".tip");
      this.key = root.querySelector(".key"); this.select = root.querySelector("select");
      this.names = root.querySelector("input[type=checkbox]");
      data.columns.forEach((column, i) => this.select.append(make("option", { value: i }, column.name)));
      this.select.addEventListener("change", () => { this.hidden.clear(); this.drawKey(); this.draw(); });
      this.names.addEventListener("change", () => this.draw());
      for (const button of root.querySelectorAll("[data-zoom]")) {
        button.addEventListener("click", () => this.zoom(button.dataset.zoom));
      }
      this.listen();
      new ResizeObserver(() => this.draw()).observe(this.canvas);
      document.addEventListener("themechange", () => { this.drawKey(); this.draw(); });
      this.drawKey();
    }

    get column() { return this.data.columns[+this.select.value] ?? null; }

    style(code) {
      const palette = themed(COLOURS);
      return { colour: palette[code % palette.length], shape: SHAPES[Math.floor(code / palette.length) % SHAPES.length] };
    }

    toScreen(i) {
      const { scale, x, y } = this.view, side = Math.min(this.width, this.height) - 28;
      return [this.width / 2 + ((this.x[i] - 0.5) * scale - x) * side, this.height / 2 + ((this.y[i] - 0.5) * scale - y) * side];
    }

    radius() {
      const base = this.data.drawn > 20000 ? 1.3 : this.data.drawn > 5000 ? 2 : this.data.drawn > 500 ? 3 : 4.5;
      return Math.min(base * this.view.scale ** 0.35, 7);
    }

    draw() {
      const ratio = devicePixelRatio || 1, canvas = this.canvas;
      this.width = canvas.clientWidth; this.height = canvas.clientHeight;
      if (!this.width) return;
      canvas.width = Math.round(this.width * ratio); canvas.height = Math.round(this.height * ratio);
      const context = canvas.getContext("2d");
      context.scale(ratio, ratio);
      const column = this.column, r = this.radius(), batches = new Map(), soft = styled("--faint");
      for (let i = 0; i < this.data.drawn; i++) {
        const byte = column ? column.bytes[i] : MISSING;
        if (this.hidden.has(byte)) continue;
        const key = column && column.kind === "number" && byte !== MISSING ? Math.floor(byte / 255 * LEVELS) : byte;
        if (!batches.has(key)) batches.set(key, []);
        batches.get(key).push(i);
      }
      const isNumber = column && column.kind === "number";
      // points without a value first, then large categories (low numbers), so that rare and high ones stay visible
      const order = [...batches.keys()].sort((a, b) => a === MISSING ? -1 : b === MISSING ? 1 : a - b);
      for (const key of order) {
        const path = new Path2D();
        const { colour, shape } = key === MISSING ? { colour: soft, shape: "circle" }
          : isNumber ? { colour: viridis(key / (LEVELS - 1)), shape: "circle" } : this.style(key);
        for (const i of batches.get(key)) outline(path, shape, ...this.toScreen(i), r);
        context.globalAlpha = this.marked.length ? 0.55 : 0.85;
        context.fillStyle = colour;
        context.fill(path);
      }
      context.globalAlpha = 1;
      if (column && !isNumber && this.names.checked) this.drawNames(context, batches);
      this.drawMarks(context);
    }

    text(context, text, x, y, taken, always) {
      const width = context.measureText(text).width;
      x = Math.min(Math.max(x, width / 2 + 4), this.width - width / 2 - 4);
      y = Math.min(Math.max(y, 10), this.height - 10);
      const box = [x - width / 2 - 3, y - 9, x + width / 2 + 3, y + 9];
      const meets = other => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3];
      if (!always && taken.some(meets)) return;
      taken.push(box);
      context.lineWidth = 4; context.lineJoin = "round";
      context.strokeStyle = styled("--back"); context.strokeText(text, x, y);
      context.fillStyle = styled("--front"); context.fillText(text, x, y);
    }

    drawNames(context, batches) {
      context.font = "600 12px system-ui, sans-serif"; context.textAlign = "center"; context.textBaseline = "middle";
      const taken = [], middle = values => values.sort((a, b) => a - b)[values.length >> 1];
      const codes = [...batches.keys()].filter(code => code !== MISSING).sort((a, b) => a - b).slice(0, 40);
      for (const code of codes) {
        const places = batches.get(code).map(i => this.toScreen(i));
        // beside small groups, which the name would hide
        const x = middle(places.map(p => p[0])), y = middle(places.map(p => p[1])) - (places.length < 60 ? 16 : 0);
        if (x < 0 || y < 0 || x > this.width || y > this.height) continue;
        const name = this.column.categories[code], short = this.column.short ? name.split(" ")[0] : name;
        this.text(context, short.length > 28 ? `${short.slice(0, 27)}…` : short, x, y, taken, false);
      }
    }

    drawMarks(context) {
      const taken = [];
      context.strokeStyle = styled("--front"); context.lineWidth = 2;
      context.font = "600 13px system-ui, sans-serif"; context.textAlign = "center"; context.textBaseline = "middle";
      this.marked.forEach((i, place) => {
        const [x, y] = this.toScreen(i);
        context.strokeStyle = styled("--front"); context.lineWidth = place ? 1.5 : 2.5;
        context.beginPath(); context.arc(x, y, this.radius() + (place ? 2 : 5), 0, 2 * Math.PI); context.stroke();
      });
      this.marked.forEach((i, place) => {
        const [x, y] = this.toScreen(i);
        this.text(context, this.data.names[i], x, y - this.radius() - 14, taken, !place);
      });
    }

    drawKey() {
      const column = this.column;
      this.key.replaceChildren();
      if (!column) return;
      if (column.kind === "number") {
        const stops = [0, 0.25, 0.5, 0.75, 1].map(viridis).join(",");
        this.key.append(
          make("div", { class: "ramp", style: `background: linear-gradient(to right, ${stops})` }),
          make("div", { class: "ends" }, make("span", {}, number(column.min)), make("span", {}, number(column.max))),
        );
        if (column.bytes.includes(MISSING)) this.key.append(make("p", { class: "soft" }, "Grey: no value"));
        return;
      }
      const entries = column.categories.map((name, code) => [name, code, column.counts[code]]);
      const missing = column.bytes.reduce((sum, byte) => sum + (byte === MISSING), 0);
      if (missing) entries.push(["(none)", MISSING, missing]);
      const all = make("button", { type: "button", onclick: () => { this.hidden.clear(); refresh(); } }, "All");
      const none = make("button", { type: "button", onclick: () => { entries.forEach(e => this.hidden.add(e[1])); refresh(); } }, "None");
      const buttons = entries.map(([name, code, count]) => {
        const button = make("button", { type: "button", class: "entry", title: name }, this.swatch(code), make("span", {}, name), make("span", { class: "soft" }, count.toLocaleString("en")));
        button.addEventListener("click", () => {
          if (this.hidden.has(code)) this.hidden.delete(code); else this.hidden.add(code);
          refresh();
        });
        return button;
      });
      const refresh = () => {
        buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(!this.hidden.has(entries[i][1]))));
        this.draw();
      };
      this.key.append(make("div", { class: "some" }, "Show ", all, none), make("div", { class: "entries" }, ...buttons));
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(!this.hidden.has(entries[i][1]))));
    }

    swatch(code) {
      const canvas = make("canvas", { width: 28, height: 28, "aria-hidden": "true" });
      const path = new Path2D(), { colour, shape } = code === MISSING ? { colour: styled("--faint"), shape: "circle" } : this.style(code);
      outline(path, shape, 14, 14, 9);
      const context = canvas.getContext("2d");
      context.fillStyle = colour; context.fill(path);
      return canvas;
    }

    zoom(how, at = [0, 0]) {
      const view = this.view;
      if (how === "reset") Object.assign(view, { scale: 1, x: 0, y: 0 });
      else {
        const scale = Math.min(Math.max(view.scale * (how === "in" ? 1.5 : 1 / 1.5), 1), 60), factor = scale / view.scale;
        view.x = (view.x + at[0]) * factor - at[0]; view.y = (view.y + at[1]) * factor - at[1]; view.scale = scale;
        if (scale === 1) Object.assign(view, { x: 0, y: 0 });
      }
      this.draw();
    }

    center(i) {
      this.view.x = (this.x[i] - 0.5) * this.view.scale; this.view.y = (this.y[i] - 0.5) * this.view.scale;
    }

    nearest(px, py) {
      let best = -1, least = 14 * 14;
      const seen = i => {
        const [x, y] = this.toScreen(i), distance = (x - px) ** 2 + (y - py) ** 2;
        if (distance < least) { least = distance; best = i; }
      };
      const bytes = this.column?.bytes;
      for (let i = 0; i < this.data.drawn; i++) if (!bytes || !this.hidden.has(bytes[i])) seen(i);
      this.marked.forEach(seen);
      return best;
    }

    describe(i) {
      const column = this.column, lines = [this.data.names[i]];
      if (column) {
        const byte = column.bytes[i];
        const value = byte === MISSING ? "none" : column.kind === "category" ? column.categories[byte]
          : number(column.min + byte / 254 * (column.max - column.min));
        lines.push(`${column.name}: ${value}`);
      }
      return lines;
    }

    hover(event) {
      const box = this.canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
      const i = this.nearest(px, py);
      this.tip.hidden = i < 0;
      if (i < 0) return i;
      const [x, y] = this.toScreen(i);
      this.tip.replaceChildren(...this.describe(i).map(line => make("div", {}, line)));
      this.tip.style.left = `${Math.min(Math.max(x + 10, 4), Math.max(this.width - this.tip.offsetWidth - 4, 4))}px`;
      this.tip.style.top = `${Math.min(Math.max(y + 10, 4), this.height - this.tip.offsetHeight - 4)}px`;
      return i;
    }

    listen() {
      const canvas = this.canvas;
      let from = null, moved = false;
      canvas.addEventListener("pointerdown", event => { from = [event.clientX, event.clientY]; moved = false; });
      canvas.addEventListener("pointermove", event => {
        if (from && event.buttons) {
          const side = Math.min(this.width, this.height) - 28;
          const dx = event.clientX - from[0], dy = event.clientY - from[1];
          if (!moved && Math.hypot(dx, dy) < 4) return;
          moved = true;
          this.view.x -= dx / side; this.view.y -= dy / side; from = [event.clientX, event.clientY];
          this.tip.hidden = true;
          this.draw();
        } else this.hover(event);
      });
      canvas.addEventListener("pointerup", event => {
        from = null;
        const i = moved ? -1 : this.hover(event);
        if (i >= 0 && this.onchoose) this.onchoose(i);
      });
      canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
      canvas.addEventListener("wheel", event => {
        if (!event.ctrlKey && !event.metaKey) return;  // the page scrolls
        event.preventDefault();
        this.zoom(event.deltaY < 0 ? "in" : "out");
      }, { passive: false });
      canvas.addEventListener("keydown", event => {
        const steps = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
        const zooms = { "+": "in", "=": "in", "-": "out", "0": "reset" };
        if (steps[event.key]) { this.view.x += steps[event.key][0]; this.view.y += steps[event.key][1]; this.draw(); }
        else if (zooms[event.key]) this.zoom(zooms[event.key]);
        else return;
        event.preventDefault();
      });
    }
  }

  class GenePanel {
    constructor(root, map, data) {
      Object.assign(this, { root, map, data });
      this.input = root.querySelector("input"); this.list = root.querySelector("[role=listbox]");
      this.result = root.querySelector(".result"); this.status = root.querySelector("[role=status]");
      this.upper = map.data.names.map(name => name.toUpperCase());
      if (data.neighbours) {
        const { k, wide } = data.neighbours;
        this.k = k;
        this.index = decode(data.neighbours.index, wide ? Uint32Array : Uint16Array);
        this.cosine = decode(data.neighbours.cosine, Int16Array);
      }
      if (data.groups) this.inGroups = decode(data.groups.cosine, Int16Array);
      map.onchoose = i => this.choose(i);
      this.input.addEventListener("input", () => this.suggest());
      this.input.addEventListener("keydown", event => this.key(event));
      this.input.addEventListener("blur", () => setTimeout(() => this.close(), 150));
      for (const button of document.querySelectorAll("[data-gene]")) {
        button.addEventListener("click", () => { this.choose(+button.dataset.gene); root.scrollIntoView({ block: "nearest" }); });
      }
      if (map.n) this.choose(data.first);
    }

    matches() {
      const text = this.input.value.trim().toUpperCase();
      if (!text) return [];
      const found = [], inside = [];
      for (let i = 0; i < this.upper.length; i++) {
        const at = this.upper[i].indexOf(text);
        if (at === 0) found.push(i); else if (at > 0 && inside.length < 8) inside.push(i);
      }
      found.sort((a, b) => this.upper[a].length - this.upper[b].length || (this.upper[a] < this.upper[b] ? -1 : 1));
      return found.concat(inside).slice(0, 8);
    }

    suggest() {
      const found = this.matches();
      this.active = -1;
      this.list.replaceChildren(...found.map((i, place) => {
        const option = make("li", { role: "option", id: `option-${place}`, "aria-selected": "false" }, this.map.data.names[i]);
        option.addEventListener("pointerdown", event => { event.preventDefault(); this.choose(i); this.close(); });
        return option;
      }));
      this.found = found;
      this.list.hidden = !found.length;
      this.input.setAttribute("aria-expanded", String(found.length > 0));
      this.input.removeAttribute("aria-activedescendant");
      this.status.textContent = this.input.value.trim() ? (found.length ? `${found.length} suggestions` : "No gene of this name has a vector here.") : "";
    }

    close() {
      this.list.hidden = true;
      this.input.setAttribute("aria-expanded", "false");
    }

    key(event) {
      const options = [...this.list.children];
      if (event.key === "Escape") this.close();
      else if (event.key === "Enter") {
        const i = this.matches()[Math.max(this.active ?? -1, 0)];
        if (i !== undefined) { this.choose(i); this.close(); }
      } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && options.length) {
        this.active = ((this.active ?? -1) + (event.key === "ArrowDown" ? 1 : -1) + options.length) % options.length;
        options.forEach((option, place) => option.setAttribute("aria-selected", String(place === this.active)));
        this.input.setAttribute("aria-activedescendant", `option-${this.active}`);
      } else return;
      event.preventDefault();
    }

    choose(i) {
      const { map } = this, names = map.data.names;
      this.input.value = names[i];
      const program = j => {
        const column = map.data.columns[0], byte = column ? column.bytes[j] : MISSING;
        return byte === MISSING ? "" : column.categories[byte];
      };
      const parts = [make("h3", {}, names[i])];
      parts.push(make("p", {}, program(i) ? `Program ${program(i)}` : "In no program"));
      const near = [];
      if (this.index) {
        const rows = [];
        for (let place = 0; place < this.k; place++) {
          const j = this.index[i * this.k + place];
          near.push(j);
          const button = make("button", { type: "button", class: "plain" }, names[j]);
          button.addEventListener("click", () => { this.choose(j); this.root.querySelector("h3").focus(); });
          rows.push(make("tr", {}, make("th", { scope: "row" }, button), make("td", { class: "number" }, (this.cosine[i * this.k + place] / 10000).toFixed(3)), make("td", {}, program(j))));
        }
        parts.push(make("table", {}, make("caption", {}, `Nearest genes of ${names[i]}`),
          make("thead", {}, make("tr", {}, ...["gene", "cosine", "program"].map(name => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows)));
      }
      if (this.inGroups) parts.push(this.groups(i));
      parts[0].tabIndex = -1;
      this.result.replaceChildren(...parts);
      this.status.textContent = `${names[i]} is marked on the map.`;
      map.marked = [i, ...near];
      const [x, y] = map.width ? map.toScreen(i) : [1, 1];
      if (map.width && (x < 0 || y < 0 || x > map.width || y > map.height)) map.center(i);
      map.draw();
    }

    groups(i) {
      const { names } = this.data.groups, rows = [];
      names.forEach((name, g) => {
        const value = this.inGroups[i * names.length + g];
        if (value !== -32768) rows.push([name, 1 - value / 10000]);
      });
      if (!rows.length) return make("p", { class: "soft" }, "No contextual vector in any group.");
      rows.sort((a, b) => b[1] - a[1]);
      const most = Math.max(rows[0][1], 1e-6);
      const items = rows.map(([name, value]) => make("li", {}, make("span", { class: "name" }, name),
        make("span", { class: "track" }, make("span", { class: "fill", style: `width: ${100 * Math.max(value, 0) / most}%` })),
        make("span", { class: "number" }, value.toFixed(3))));
      return make("div", {}, make("h4", {}, "Distance (1 − cosine) from its mean over groups"), make("ol", { class: "bars" }, ...items));
    }
  }

  const read = id => { const node = document.getElementById(id); return node ? JSON.parse(node.textContent) : null; };
  const cells = read("cells-data"), genes = read("genes-data");
  if (cells) new PointMap(document.getElementById("cells-map"), cells);
  if (genes) new GenePanel(document.getElementById("gene-panel"), new PointMap(document.getElementById("genes-map"), genes.map), genes);
  for (const node of document.querySelectorAll(".needs-script")) node.hidden = false;
})();
