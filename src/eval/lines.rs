//! Every answer with what was thought of it, as JSON lines.

use serde_json::{Value, json};

use super::summary::{Evaluation, Judged};
use crate::engine::TokenGates;
use crate::types::FinishReason;

impl Evaluation {
    /// One object an answer: `set`, `id`, `class`, `prompt`, `variant`, `seed`, `answer`, `finish`, `tokens`, `outcome`; and what is
    /// known of `reward`, `cost`, `prompt_last_gates`, `prompt_mean_gates` and `answer_mean_gates` (of each layer).
    pub fn to_jsonl(&self) -> String {
        let lines = self.answers.iter().map(|judged| self.line(judged));
        lines.map(|line| line.to_string() + "\n").collect()
    }

    fn line(&self, judged: &Judged) -> Value {
        let answer = &judged.answer;
        let prompt = &self.prompts[answer.prompt];
        let mut line = json!({
            "set": prompt.set,
            "id": prompt.id,
            "class": prompt.class,
            "prompt": prompt.text,
            "variant": &*answer.contender,
            "seed": answer.seed,
            "answer": answer.text,
            "finish": word(answer.finish),
            "tokens": answer.tokens,
            "outcome": judged.outcome,
        });
        let prompt_gates = answer.prompt_gates.as_ref();
        for (name, known) in [
            ("reward", judged.reward.map(Value::from)),
            ("cost", judged.cost.map(Value::from)),
            ("prompt_last_gates", prompt_gates.map(|g| gates(&g.last))),
            ("prompt_mean_gates", prompt_gates.map(|g| gates(&g.mean))),
            ("answer_mean_gates", answer.answer_gates.as_ref().map(gates)),
        ] {
            if let Some(known) = known {
                line[name] = known;
            }
        }
        line
    }
}

fn gates(gates: &TokenGates) -> Value {
    json!({ "safety": gates.safety, "helpfulness": gates.helpfulness })
}

fn word(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::summary::tests::evaluation;
    use super::*;

    #[test]
    fn a_line_says_what_is_known_of_an_answer_and_nothing_else() {
        let evaluation = evaluation();
        let lines: Vec<Value> = evaluation
            .to_jsonl()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), evaluation.answers.len());
        let (routed, base) = (&lines[0], &lines[1]);
        assert_eq!(
            (&routed["variant"], &base["variant"]),
            (&"routed".into(), &"base".into())
        );
        assert_eq!(
            (&routed["class"], &routed["outcome"]),
            (&"harmful".into(), &"refusal".into())
        );
        assert_eq!(routed["prompt_last_gates"]["safety"][1], 0.5);
        assert_eq!(
            (&base["cost"], &base["finish"]),
            (&2.0.into(), &"stop".into())
        );
        assert!(base.get("prompt_last_gates").is_none() && base.get("answer_mean_gates").is_none());
    }
}
