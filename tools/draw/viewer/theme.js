"use strict";
/* Light and dark: as the system has it, or as the reader has chosen. Print stays light. */

const Theme = (() => {
  const themed = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).filter((rule) => rule.media?.mediaText.includes("prefers-color-scheme"));
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  const tell = () => listeners.forEach((listener) => listener());
  let dark = null;
  preferred.addEventListener("change", tell);
  return {
    onChange: (listener) => listeners.push(listener),
    switch() {
      dark = !(dark ?? preferred.matches);
      for (const rule of themed) rule.media.mediaText = dark ? "screen" : "not all";
      document.documentElement.style.colorScheme = dark ? "dark" : "light";
      tell();
    },
  };
})();
