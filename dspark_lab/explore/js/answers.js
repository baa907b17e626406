// The widget of answers: their text, or a chart of them, as their state says.

const ANSWER_KINDS = { answer: renderAnswer, chart: renderChart };

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
