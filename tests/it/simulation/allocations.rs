//! What a decode step takes from the allocator once everything is warm: nothing, but for what grows with the answers.

use midpo::engine::{GateDetail, Submission};
use midpo::types::{BLOCK_TOKENS, Variant};

use super::rig::{Rig, greedy, ids, random, roomy};

const WARM_UP: usize = 40;
/// Long enough that blocks are taken and named.
const STEPS: usize = 6 * BLOCK_TOKENS;
/// Events of a stream that tokio's channel keeps in one piece of memory.
const CHANNEL_BLOCK: usize = 32;

/// One that is told tokens and no more: what else is told of a token is memory of the client's.
fn terse(mut submission: Submission) -> Submission {
    submission.sampling.logprobs = None;
    submission.gate_detail = GateDetail::None;
    submission
}

#[test]
fn a_decode_step_allocates_only_what_grows_with_the_answers() {
    let mut rig = Rig::new("tiny-routed", &roomy());
    let mut submissions = vec![greedy(&ids(1, 20), Variant::Base, 300)];
    for (seed, variant) in [(2, Variant::Routed), (3, Variant::Both)] {
        let mut drawn = random(&ids(seed, 33), variant, 300, seed.into());
        // What penalties look at grows with the distinct tokens of an answer.
        drawn.sampling.repetition_penalty = 1.0;
        submissions.push(drawn);
    }
    let submissions: Vec<_> = submissions.into_iter().map(terse).collect();
    let streams: Vec<_> = submissions.iter().map(|one| rig.submit(one)).collect();
    for _ in 0..WARM_UP {
        rig.engine.step().unwrap();
    }
    let counts: Vec<u64> = (0..STEPS)
        .map(|_| allocation_counter::measure(|| rig.engine.step().unwrap()).count_total)
        .collect();
    assert_eq!(rig.engine.scheduler().running(), streams.len());
    let quiet = counts.iter().filter(|count| **count == 0).count();
    assert!(quiet > STEPS * 3 / 4, "{counts:?}");
    // Of each stream: its events, and room for tokens, blocks and their names, each doubled twice at most where some 60 tokens
    // become 156; of the pool, the index of names.
    let per_stream = STEPS / CHANNEL_BLOCK + 1 + 3 * 2;
    let most = (streams.len() * per_stream + 1) as u64;
    assert!(counts.iter().sum::<u64>() <= most, "{most} {counts:?}");
}
