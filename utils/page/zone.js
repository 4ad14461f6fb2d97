// The drop zone: sends a picture's bytes to the gate, and tells Python the ticket that it got for them.
const visitor = [...crypto.getRandomValues(new Uint32Array(4))].join("-");  // whose last image waits, and no other
const input = element.querySelector("input"), zone = element.querySelector("label"), said = element.querySelector("[role=alert]");

async function send(file) {
  if (!file) return;
  said.textContent = "";
  if (file.size > Number(zone.dataset.bytes)) {
    said.textContent = `This file has ${(file.size / 2 ** 20).toFixed(1)} MiB; at most ${zone.dataset.bytes / 2 ** 20} MiB are taken.`;
    return;
  }
  zone.classList.add("busy");
  try {
    let reply, answer;
    for (let tries = 1; ; tries++) {
      reply = await fetch(new URL("picture", document.baseURI), {
        method: "POST", body: file,
        headers: {
          "Content-Type": "application/octet-stream", "X-Visitor": visitor,
          "X-Picture-Name": encodeURIComponent(file.name || "pasted.png"),
        },
      });
      answer = await reply.json();
      if (reply.status !== 503 || tries === 6) break;
      said.textContent = answer.message;  // and it is tried again by itself
      await new Promise((later) => setTimeout(later, 1000 * Number(reply.headers.get("Retry-After") || 5)));
      said.textContent = "";
    }
    if (reply.ok) trigger("upload", { ticket: answer.ticket });
    else said.textContent = answer.message;
  } catch {
    said.textContent = "The picture could not be sent: the server does not answer.";
  }
  zone.classList.remove("busy");
  input.value = "";  // the same file may be chosen again
}

input.addEventListener("change", () => send(input.files[0]));
for (const name of ["dragenter", "dragover", "dragleave", "drop"])
  zone.addEventListener(name, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") send(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); send(file); }
});
