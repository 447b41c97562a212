// The demo page's own part: copying, and the looks that one can try.
"use strict";

const line = document.getElementById("line");
const looks = document.getElementById("looks");
const DEFAULTS = { accent: "#2457d6" };

// On a wide screen the text stands where the chat does not.
function makeRoom() {
  const launcher = document.querySelector("chatd-widget")?.shadowRoot.querySelector(".launcher");
  const isLeft = launcher?.getBoundingClientRect().left < innerWidth / 2;
  document.body.classList.toggle("right", isLeft);
}

(window.chatd ||= []).push((chatd) => {
  chatd.on("ready", makeRoom);
  document.getElementById("open").addEventListener("click", () => chatd.open());
  // Where there is room for both, the chat is what one sees first.
  if (innerWidth >= 1180 && innerHeight >= 640) chatd.open();
});

looks.addEventListener("input", () => {
  const chat = document.querySelector("chatd-widget");
  let attributes = "";
  for (const { name, value } of looks.elements) {
    if (value && value !== DEFAULTS[name]) {
      chat?.setAttribute(name, value);
      attributes += ` data-${name}="${value}"`;
    } else {
      chat?.removeAttribute(name);
    }
  }
  makeRoom();
  line.textContent = line.dataset.line.replace("></script>", `${attributes}></script>`);
});

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    } catch {
      getSelection().selectAllChildren(text);
    }
  });
}
