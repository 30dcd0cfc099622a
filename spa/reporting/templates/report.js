"use strict";
(() => {
  const { frames, nodes } = JSON.parse(document.getElementById("data").textContent);
  const view = document.querySelector(".view"), panel = document.querySelector(".panel"), svg = document.querySelector("svg.net");
  const ROW = 34, HEAD = 30, PAD = 14;
  const open = new Set();
  let scale = 1, size = [frames[0].width, frames[0].height];

  // Lists: the rest of the rows, and sorting.
  for (const button of document.querySelectorAll("button.more")) {
    button.addEventListener("click", () => {
      const all = button.previousElementSibling.querySelector("table").classList.toggle("all");
      button.textContent = all ? "Show fewer" : "Show " + button.dataset.all;
    });
  }
  for (const head of document.querySelectorAll("table.sortable th[aria-sort]")) {
    head.addEventListener("click", () => {
      const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
      const number = head.classList.contains("n"), down = head.getAttribute("aria-sort") === "none" ? number : head.getAttribute("aria-sort") === "ascending";
      const shown = [...body.rows].filter(r => !r.classList.contains("rest")).length;
      const key = r => number ? Number(r.cells[at].dataset.v) : r.cells[at].dataset.v;
      const rows = [...body.rows].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (down ? -1 : 1));
      for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.forEach((r, i) => { r.classList.toggle("rest", i >= shown); body.append(r); });
    });
  }

  // The picture: what belongs to each frame.
  const parts = frames.map(() => ({ boxes: [], labels: [], wires: [] }));
  for (const g of svg.querySelectorAll(".item")) {
    const part = parts[g.dataset.frame];
    part.boxes[g.dataset.at] = g;
    const next = g.nextElementSibling;
    if (next && next.classList.contains("width")) part.labels[g.dataset.at] = next;
  }
  parts[0].wires = [...svg.querySelectorAll("[data-frame='0'] > .wire")];
  frames.forEach((frame, f) => frame.items.forEach(([, , inside], at) => {
    if (inside >= 0) parts[inside].wires = [...parts[f].boxes[at].querySelector(":scope > .inside").children].filter(c => c.classList.contains("wire"));
  }));

  // Rows keep their order; a block that opens pushes apart what stands in its row, and its row pushes down what comes below.
  const arrange = number => {
    const frame = frames[number], part = parts[number], count = frame.items.length, x = frame.x.slice(), ends = [];
    const sizes = frame.items.map(([w, h, inside]) => {
      if (inside < 0 || !open.has(inside)) return [w, h];
      const [iw, ih] = arrange(inside);
      return [Math.max(w, iw + 2 * PAD), ih + HEAD + PAD + 6];
    });
    let y = 0;
    for (const row of frame.rows) {
      for (const n of row) {
        const more = n < count ? (sizes[n][0] - frame.items[n][0]) / 2 : 0;
        if (more > 0) for (const m of row) if (m !== n) x[m] += (row.indexOf(m) > row.indexOf(n) ? 1 : -1) * more;
      }
      const height = Math.max(0, ...row.map(n => n < count ? sizes[n][1] : 0));
      for (const n of row) {
        const h = n < count ? sizes[n][1] : height;
        ends[n] = [x[n], y + (height - h) / 2, y + (height + h) / 2];
      }
      y += height + ROW;
    }
    const left = Math.min(0, ...frame.items.map((_, n) => x[n] - sizes[n][0] / 2), ...x.slice(count));
    for (const end of ends) end[0] -= left;
    frame.items.forEach(([w, h, inside], n) => {
      const g = part.boxes[n], [bw, bh] = sizes[n], shown = inside >= 0 && open.has(inside), [cx, head, foot] = ends[n];
      g.setAttribute("transform", `translate(${cx} ${(head + foot) / 2})`);
      if (part.labels[n]) { part.labels[n].setAttribute("x", cx + 6); part.labels[n].setAttribute("y", foot + 14); }
      if (inside < 0) return;
      const box = g.querySelector(":scope > .box"), inner = g.querySelector(":scope > .inside"), mark = g.querySelector(":scope > .fold");
      for (const [key, value] of [["x", -bw / 2], ["y", -bh / 2], ["width", bw], ["height", bh]]) box.setAttribute(key, value);
      g.querySelector(":scope > .op").setAttribute("y", shown ? -bh / 2 + 20 : -4);
      mark.setAttribute("d", shown ? `M${-bw / 2 + 10} ${-bh / 2 + 14}l4 5 4-5` : `M${-bw / 2 + 12} -4l5 4-5 4`);
      const flake = g.querySelector(":scope > g:not(.inside)");
      if (flake) flake.setAttribute("transform", `translate(${bw / 2 - 3} ${-bh / 2 + 3})`);
      if (shown) inner.setAttribute("transform", `translate(${-frames[inside].now[0] / 2} ${-bh / 2 + HEAD})`);
      inner.toggleAttribute("hidden", !shown);
      g.classList.toggle("open", shown);
      g.setAttribute("aria-expanded", shown);
    });
    frame.links.forEach(([a, b], i) => {
      const [x1, , y1] = ends[a], [x2, y2, foot] = ends[b], half = (y2 - y1) / 2;
      part.wires[i].setAttribute("d", `M${x1} ${y1}C${x1} ${y1 + half} ${x2} ${y2 - half} ${x2} ${y2}` + (b >= count ? `V${foot}` : ""));
    });
    const wide = Math.max(frame.width - left, ...frame.items.map((_, n) => ends[n][0] + sizes[n][0] / 2), ...ends.map(e => e[0]));
    return frame.now = [wide, Math.max(y - ROW, 0)];
  };
  const zoom = wanted => {
    scale = Math.min(Math.max(wanted, 0.05), 3);
    svg.setAttribute("width", (size[0] + 32) * scale);
    svg.setAttribute("height", (size[1] + 32) * scale);
  };
  const draw = anchor => {
    const before = anchor && anchor.querySelector(".box").getBoundingClientRect();
    size = arrange(0);
    svg.setAttribute("viewBox", `-16 -16 ${size[0] + 32} ${size[1] + 32}`);
    zoom(scale);
    if (!before) return;
    const after = anchor.querySelector(".box").getBoundingClientRect();
    view.scrollTop += after.top - before.top;
    view.scrollLeft += after.left + after.width / 2 - before.left - before.width / 2;
  };
  const fit = () => zoom(Math.max(Math.min(view.clientWidth / (size[0] + 32), view.clientHeight / (size[1] + 32), 1), 0.12));
  const does = {
    in: () => zoom(scale * 1.25), out: () => zoom(scale / 1.25), full: () => zoom(1), fit,
    unfold: () => { frames.forEach(f => f.items.forEach(i => i[2] >= 0 && open.add(i[2]))); draw(); },
    fold: () => { open.clear(); draw(); },
  };
  for (const button of document.querySelectorAll(".tools button")) {
    button.addEventListener("click", () => {
      const [x, y] = [(view.scrollLeft + view.clientWidth / 2) / view.scrollWidth, (view.scrollTop + view.clientHeight / 2) / view.scrollHeight];
      does[button.dataset.do]();
      view.scrollLeft = x * view.scrollWidth - view.clientWidth / 2;
      view.scrollTop = y * view.scrollHeight - view.clientHeight / 2;
    });
  }

  // What the panel says. Names come in as text, never as markup.
  const add = (parent, tag, text, kind) => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const tell = g => {
    for (const other of svg.querySelectorAll(".chosen")) other.classList.remove("chosen");
    g.classList.add("chosen");
    panel.replaceChildren();
    if (g.dataset.node === undefined) {
      const [title, ...lines] = g.querySelector("title").textContent.split("\n");
      add(panel, "h3", title);
      for (const line of lines) add(panel, "p", line);
      return;
    }
    const [op, name, state, lists] = nodes[g.dataset.node];
    add(panel, "h3", op);
    add(panel, "p", "", "name").appendChild(document.createElement("code")).textContent = name;
    add(panel, "p", state, "state " + g.classList[2]);
    for (const [label, lines] of lists) {
      add(panel, "h4", label);
      for (const line of lines) add(panel, "code", line);
    }
  };
  const choose = g => {
    tell(g);
    const inside = frames[g.dataset.frame].items[g.dataset.at][2];
    if (inside < 0) return;
    open.has(inside) ? open.delete(inside) : open.add(inside);
    draw(g);
  };
  let held = null, moved = false;
  const box = event => event.target.closest && event.target.closest(".item.node, .item.block");
  svg.addEventListener("click", event => { const g = box(event); if (g && !moved) choose(g); });
  svg.addEventListener("keydown", event => {
    if ((event.key === "Enter" || event.key === " ") && box(event)) { event.preventDefault(); choose(box(event)); }
  });
  view.addEventListener("pointerdown", event => { if (event.pointerType === "mouse") held = [event.clientX, event.clientY, view.scrollLeft, view.scrollTop]; moved = false; });
  window.addEventListener("pointermove", event => {
    if (!held) return;
    moved = moved || Math.hypot(event.clientX - held[0], event.clientY - held[1]) > 4;
    if (moved) { view.classList.add("held"); view.scrollLeft = held[2] - event.clientX + held[0]; view.scrollTop = held[3] - event.clientY + held[1]; }
  });
  window.addEventListener("pointerup", () => { held = null; view.classList.remove("held"); });
  view.addEventListener("wheel", event => { if (event.ctrlKey) { event.preventDefault(); zoom(scale * (event.deltaY < 0 ? 1.1 : 1 / 1.1)); } }, { passive: false });
  window.addEventListener("beforeprint", () => zoom(1));
  if (size[0] + 32 > view.clientWidth) zoom(Math.max(view.clientWidth / (size[0] + 32), 0.55));
  view.scrollLeft = (view.scrollWidth - view.clientWidth) / 2;
})();
