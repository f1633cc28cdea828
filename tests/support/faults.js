// What keeps somebody from using a page: the checks of WCAG 2.2 that a program can make on these pages. Returns sentences.
(() => {
  const found = [], all = (selector) => [...document.querySelectorAll(selector)];
  const seen = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const name = (e) => (e.getAttribute("aria-label") || e.innerText || e.title || "").trim();
  if (!document.documentElement.lang) found.push("the page has no language");
  if (!document.title.trim()) found.push("the page has no title");
  if (all("main").length !== 1) found.push("expected one main landmark");
  if (all("h1").length !== 1) found.push("expected one heading of level 1");
  let level = 0;
  for (const e of all("h1,h2,h3,h4")) {
    const next = Number(e.tagName[1]);
    if (next > level + 1) found.push(`heading skips a level: ${e.innerText}`);
    level = next;
  }
  const ids = all("[id]").map((e) => e.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push(`id twice: ${id}`);
  for (const e of all("a[href],button,summary")) if (seen(e) && !name(e)) found.push(`no name: ${e.outerHTML.slice(0, 80)}`);
  for (const e of all("input:not([type=hidden]),select,textarea"))
    if (!(e.labels && e.labels.length) && !e.getAttribute("aria-label")) found.push(`no label: ${e.name}`);
  for (const e of all("svg")) if (!(e.getAttribute("role") === "img" && e.getAttribute("aria-label"))) found.push("a drawing has no text");
  for (const e of all("th")) if (!e.scope) found.push("a heading cell has no scope");
  for (const e of all("nav")) if (!e.getAttribute("aria-label")) found.push("a navigation has no name");
  for (const e of all("button")) if (seen(e) && e.getBoundingClientRect().height < 24) found.push(`too small: ${name(e)}`);
  const part = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const colour = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = colour(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !seen(e) || e.closest("[disabled],option")) continue;
    const [x, y] = [light(colour(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
    if ((x + 0.05) / (y + 0.05) < 4.5) found.push(`contrast ${((x + 0.05) / (y + 0.05)).toFixed(2)}: ${walk.currentNode.data.trim().slice(0, 40)}`);
  }
  return [...new Set(found)];
})()
