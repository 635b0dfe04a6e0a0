// What scrolls sideways can be reached with the keyboard.
function reachable() {
  for (const box of document.querySelectorAll("article pre, article div.math, article table")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

addEventListener("load", () => {
  reachable();
  window.MathJax?.startup?.promise.then(reachable);
});
addEventListener("resize", reachable);
