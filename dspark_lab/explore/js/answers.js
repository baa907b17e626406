// The widget of answers: their text, a chart of them, or a picture, as their state says.

const ANSWER_KINDS = { answer: renderAnswer, chart: renderChart, picture: renderPicture };

// A picture that Python drew.
function renderPicture({ model, el }) {
  const image = node("img", { style: { maxWidth: "100%", height: "auto" } });
  el.append(image);
  let address = "";
  const show = () => {
    const state = model.get("state");
    URL.revokeObjectURL(address);
    address = URL.createObjectURL(new Blob([state.png], { type: "image/png" }));
    image.src = address;
    image.alt = state.alt;
    el.dataset.frame = state.frame ?? 0;
  };
  show();
  model.on("change:state", show);
  return () => {
    URL.revokeObjectURL(address);
    model.off("change:state", show);
  };
}

function render({ model, el }) {
  let [kind, stop] = ["", () => {}];
  const show = () => {
    const wanted = (model.get("state") ?? {}).show;
    if (wanted === kind || !ANSWER_KINDS[wanted]) return;
    stop();
    el.replaceChildren();
    kind = wanted;
    stop = ANSWER_KINDS[kind]({ model, el });
  };
  show();
  model.on("change:state", show);
  return () => {
    stop();
    model.off("change:state", show);
  };
}

export default { render };
