// The conversation: which turn was clicked, and whether for its mask without [SEG].
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-turn]");
  if (button) trigger("select", { turn: Number(button.dataset.turn), anyway: "anyway" in button.dataset });
});
