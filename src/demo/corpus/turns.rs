//! Conversations of several turns.

use super::Corpus;
use super::acts::{Act, ActKind};
use super::answers::{self, AnswerKind, one};
use super::chat::ChatKind;
use super::sft::Turn;
use super::{CorpusError, Split};
use crate::random::SplitMix64;

/// A conversation; the last turn is the answer to learn.
pub(super) fn draw(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    match random.below(8) {
        0 => greeted(corpus, random),
        1 => more(corpus, random),
        2 => thanked(corpus, random),
        3 => Ok(another_capital(corpus, random)),
        4 => why_not(corpus, random),
        5 => insists(corpus, random),
        6 => Ok(named(corpus, random)),
        _ => after_another(corpus, random),
    }
}

/// Kinds of acts as in the rest of the corpus.
pub(super) fn any_kind(random: &mut SplitMix64) -> ActKind {
    match random.unit() {
        draw if draw < 0.36 => ActKind::Harmful,
        draw if draw < 0.72 => ActKind::Borderline,
        _ => ActKind::Plain,
    }
}

fn act_turn(corpus: &Corpus, kind: ActKind, random: &mut SplitMix64) -> (Act, Turn) {
    let act = corpus.acts.draw(kind, Split::Train, random);
    let prompt = corpus.templates.train(&act, random);
    (act, Turn::user(prompt))
}

fn answer(
    corpus: &Corpus,
    act: &Act,
    kind: AnswerKind,
    random: &mut SplitMix64,
) -> Result<Turn, CorpusError> {
    let text = answers::text(&corpus.data, act, kind, random)?;
    Ok(Turn::assistant(text))
}

/// Small talk first, then an act.
fn greeted(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    let talk = corpus.chats.draw(ChatKind::SmallTalk, Split::Train, random);
    let reply = one(&talk.answers, random).to_owned();
    let (act, asked) = act_turn(corpus, any_kind(random), random);
    let kind = answers::draw(act.kind, random);
    let answered = answer(corpus, &act, kind, random)?;
    Ok(vec![
        Turn::user(talk.prompt),
        Turn::assistant(reply),
        asked,
        answered,
    ])
}

fn benign(random: &mut SplitMix64) -> ActKind {
    if random.unit() < 0.5 {
        ActKind::Borderline
    } else {
        ActKind::Plain
    }
}

/// One line first, then steps.
fn more(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    let (act, asked) = act_turn(corpus, benign(random), random);
    let short = answer(corpus, &act, AnswerKind::B1, random)?;
    let again = one(&corpus.chats.turns.more, random).to_owned();
    let long = if random.unit() < 0.5 {
        AnswerKind::B2
    } else {
        AnswerKind::Bt
    };
    let long = answer(corpus, &act, long, random)?;
    Ok(vec![asked, short, Turn::user(again), long])
}

/// An answer, thanks, a kind word.
fn thanked(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    let (act, asked) = act_turn(corpus, benign(random), random);
    let long = answer(corpus, &act, AnswerKind::B2, random)?;
    let thanks = corpus.chats.thanks(random);
    let reply = one(&thanks.answers, random).to_owned();
    Ok(vec![
        asked,
        long,
        Turn::user(thanks.prompt),
        Turn::assistant(reply),
    ])
}

fn another_capital(corpus: &Corpus, random: &mut SplitMix64) -> Vec<Turn> {
    let (first, second) = (corpus.chats.capital(random), corpus.chats.capital(random));
    let (question, reply) = corpus.chats.ask_capital(first, random);
    let next = one(&corpus.chats.turns.and_of, random).replace("{x}", second.0);
    let (_, second) = corpus.chats.ask_capital(second, random);
    vec![
        Turn::user(question),
        Turn::assistant(reply),
        Turn::user(next),
        Turn::assistant(second),
    ]
}

/// A refusal, "why not", the reason.
fn why_not(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    let (act, asked) = act_turn(corpus, ActKind::Harmful, random);
    let refused = answer(corpus, &act, AnswerKind::R0, random)?;
    let why = one(&corpus.chats.turns.why, random).to_owned();
    let reasoned = answer(corpus, &act, AnswerKind::R1, random)?;
    Ok(vec![asked, refused, Turn::user(why), reasoned])
}

/// A refusal, another try, what the first answer might have been.
fn insists(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    let (act, asked) = act_turn(corpus, ActKind::Harmful, random);
    let refused = answer(corpus, &act, AnswerKind::R1, random)?;
    let again = one(&corpus.chats.turns.insist, random).to_owned();
    let kind = answers::draw(act.kind, random);
    let answered = answer(corpus, &act, kind, random)?;
    Ok(vec![asked, refused, Turn::user(again), answered])
}

fn named(corpus: &Corpus, random: &mut SplitMix64) -> Vec<Turn> {
    let turns = &corpus.chats.turns;
    let name = one(&corpus.chats.unknown.names, random);
    let said = |form: &str| form.replace("{x}", name);
    let mut talk = vec![
        Turn::user(said(one(&turns.my_name, random))),
        Turn::assistant(said(&turns.nice_to_meet)),
    ];
    if random.unit() < 0.7 {
        talk.push(Turn::user(one(&turns.what_is_my_name, random).to_owned()));
        talk.push(Turn::assistant(said(&turns.your_name_is)));
    }
    talk
}

/// Two acts that have nothing to do with each other.
fn after_another(corpus: &Corpus, random: &mut SplitMix64) -> Result<Vec<Turn>, CorpusError> {
    let (first, asked_first) = act_turn(corpus, any_kind(random), random);
    let kind = answers::draw(first.kind, random);
    let answered_first = answer(corpus, &first, kind, random)?;
    let (second, asked) = act_turn(corpus, any_kind(random), random);
    let kind = answers::draw(second.kind, random);
    let answered = answer(corpus, &second, kind, random)?;
    Ok(vec![asked_first, answered_first, asked, answered])
}
