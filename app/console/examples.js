// Example texts: those that match the model's labels, or a few that suit any model.

const EXAMPLES = [
  [["sport"], "Sport", "The striker scored twice in extra time and the home side won the cup."],
  [["world", "politic"], "World", "The prime minister flew to Geneva for talks on a ceasefire along the disputed border."],
  [["business", "econom", "financ"], "Business", "Shares in the chip maker fell nine percent after it cut its forecast for the quarter."],
  [["sci", "tech"], "Science", "Astronomers found water vapour in the atmosphere of a planet forty light years away."],
  [["business", "sport"], "Sport or business", "The club’s owners sold a third of its shares to pay for the new stadium and a striker."],
  [["world", "sci"], "World or science", "Ministers of thirty states agreed to limit satellites that cross the sky at night."],
  [["positive", "negative", "sentiment", "pos", "neg", "star"], "Praise", "I loved every minute of it: warm, funny, and beautifully played."],
  [["positive", "negative", "sentiment", "pos", "neg", "star"], "Complaint", "It broke after a week, and nobody ever answered my letters."],
  [["joy", "anger", "sad", "fear", "emotion"], "Joy", "We danced in the kitchen until the neighbours joined in."],
  [["joy", "anger", "sad", "fear", "emotion"], "Fear", "Something moved behind the door, and I did not dare to breathe."],
  [["spam", "ham", "toxic"], "Offer", "Congratulations! You have won a prize, call now to claim it."],
];
const ANY = [
  ["News", "The ferry to the islands was cancelled for a third day because of the storm."],
  ["Review", "The soup was excellent, the service slow, and I would go again."],
  ["Question", "How long does it take until the parcel arrives?"],
];

/** [name, text] pairs for a model with these labels and concepts. */
export function examplesFor(names) {
  const known = names.map((name) => name.toLowerCase());
  const suits = (stems) => stems.some((stem) => known.some((name) => name.split(/[^\p{L}]+/u).some((word) => word.startsWith(stem)) || name === stem));
  const found = EXAMPLES.filter(([stems]) => suits(stems)).map(([, name, text]) => [name, text]);
  return found.length ? found.slice(0, 6) : ANY;
}
