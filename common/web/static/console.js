// Keeps an open page current: when the console says that something changed, the page is asked for again, and its content
// is replaced. While somebody fills in a form nothing is replaced; a note says that the page has changed. Reading needs
// none of this.
"use strict";
(() => {
  const body = document.body, note = document.getElementById("changed");
  if (!body.dataset.events || !window.EventSource) return;
  const busy = () => {
    const main = document.getElementById("main"), at = document.activeElement;
    if (at && main.contains(at) && at.matches("input, select, textarea, button")) return true;
    return [...main.querySelectorAll("input, textarea")].some((field) => field.type !== "hidden" && field.value !== field.defaultValue);
  };
  const refresh = async (known = true) => {
    if (busy()) { note.hidden = note.hidden && !known; return; }
    const answer = await fetch(location.href, { credentials: "same-origin", headers: { "X-Refresh": "1" } });
    if (!answer.ok || answer.redirected) { location.reload(); return; }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html"), fresh = page.getElementById("main");
    if (!fresh || busy()) { note.hidden = false; return; }
    document.getElementById("main").replaceWith(document.adoptNode(fresh));
    note.hidden = true;
  };
  const source = new EventSource(body.dataset.events);
  let lost = false;
  source.addEventListener("changed", () => refresh().catch(() => {}));
  source.addEventListener("error", () => { lost = true; });
  // Once at the beginning, too: what changed after the page was written and before the console watched was not told.
  source.addEventListener("open", () => { refresh(lost).catch(() => {}); lost = false; });
})();
