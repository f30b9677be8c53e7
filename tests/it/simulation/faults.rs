//! Steps that fail, a device that keeps failing, panics, and ends in order.

use midpo::config::EngineConfig;
use midpo::engine::{Engine, EngineState, SubmitError};
use midpo::metrics::Metrics;
use midpo::types::Variant;

use super::engine::{others, probe};
use super::fragile::{Faults, Fragile};
use super::rig::{Answer, End, Rig, cpu, ids, model, random, roomy};

fn fragile(config: &EngineConfig) -> (Rig<Fragile>, Faults) {
    let faults = Faults::default();
    let backend = Fragile {
        inner: cpu(),
        faults: faults.clone(),
    };
    (Rig::over(backend, "tiny-routed", config), faults)
}

#[test]
fn a_failed_step_ends_its_sequences_and_the_engine_goes_on() {
    let (mut rig, faults) = fragile(&roomy());
    let mut streams: Vec<_> = others()[..4].iter().map(|one| rig.submit(one)).collect();
    rig.engine.step().unwrap();
    faults.fail(1);
    rig.run();
    for stream in &mut streams {
        let answer = Answer::read(stream);
        assert!(matches!(answer.choices[0].end, Some(End::Failed(_))));
    }
    assert_eq!(rig.held(), 0);
    assert_eq!(rig.metrics.step_failures.get(), 1);
    // Nothing that the failed step left behind is found by others.
    let alone = Rig::new("tiny-routed", &roomy()).answer(&probe());
    assert_eq!(rig.answer(&probe()).only().bits(), alone.only().bits());
}

#[test]
fn choices_fail_together_when_their_prompt_cannot_be_computed() {
    let (mut rig, faults) = fragile(&roomy());
    let mut submission = probe();
    (submission.choices, submission.prompt_logprobs) = (3, Some(1));
    let mut stream = rig.submit(&submission);
    faults.fail(1);
    rig.run();
    let answer = Answer::read(&mut stream);
    assert_eq!(answer.choices.len(), 3);
    let failed = |end: &Option<End>| matches!(end, Some(End::Failed(_)));
    assert!(answer.choices.iter().all(|choice| failed(&choice.end)));
}

#[test]
fn an_engine_whose_device_keeps_failing_dies() {
    let (rig, faults) = fragile(&roomy());
    faults.fail(1000);
    let submissions = [
        others()[0].clone(),
        others()[1].clone(),
        others()[2].clone(),
    ];
    let Rig { handle, engine, .. } = rig;
    let thread = std::thread::spawn(|| engine.run());
    for submission in submissions {
        let Ok(mut stream) = handle.submit(submission) else {
            continue;
        };
        let mut answer = Answer::read(&mut stream);
        while let Some(event) = stream.next_blocking() {
            answer.push(event);
        }
        assert!(matches!(answer.choices[0].end, Some(End::Failed(_))));
    }
    assert_eq!(thread.join().unwrap(), EngineState::Dead);
    assert_eq!(handle.state(), EngineState::Dead);
}

#[test]
fn a_panic_tells_every_open_request_and_ends_in_death() {
    let (mut rig, faults) = fragile(&roomy());
    let mut running = random(&ids(1, 20), Variant::Routed, 50, 1);
    running.choices = 2;
    let mut streams = vec![rig.submit(&running)];
    for _ in 0..4 {
        rig.engine.step().unwrap();
    }
    // One that runs, one that has not come in yet.
    streams.push(rig.submit(&probe()));
    faults.panic();
    let Rig {
        handle,
        engine,
        metrics,
    } = rig;
    let state = std::thread::spawn(|| engine.run()).join().unwrap();
    assert_eq!(state, EngineState::Dead);
    assert_eq!(handle.state(), EngineState::Dead);
    assert_eq!(handle.submit(probe()).err(), Some(SubmitError::EngineGone));
    for (stream, choices) in streams.iter_mut().zip([2, 1]) {
        let mut answer = Answer::read(stream);
        assert!(stream.next_blocking().is_none(), "the stream is closed");
        assert_eq!(answer.choices.len(), choices);
        for choice in answer.choices.drain(..) {
            assert!(matches!(choice.end, Some(End::Failed(_))), "{choice:?}");
        }
    }
    assert_eq!(metrics.sequences_running.get(), 0);
    assert_eq!(handle.waiting(), 0);
}

#[test]
fn a_draining_engine_finishes_what_it_has_and_stops() {
    let config = roomy();
    let metrics = std::sync::Arc::new(Metrics::new("m"));
    let model = model(cpu(), "tiny-routed", &config);
    let (handle, thread) = Engine::spawn(model, &config, metrics).unwrap();
    assert_eq!(handle.state(), EngineState::Running);
    let streams: Vec<_> = others()
        .into_iter()
        .map(|one| (one.sampling.max_tokens, handle.submit(one).unwrap()))
        .collect();
    handle.drain();
    assert_eq!(handle.submit(probe()).err(), Some(SubmitError::Draining));
    for (max_tokens, mut stream) in streams {
        let mut answer = Answer::read(&mut stream);
        while let Some(event) = stream.next_blocking() {
            answer.push(event);
        }
        assert_eq!(answer.only().tokens.len(), max_tokens as usize);
    }
    assert_eq!(thread.join(), EngineState::Stopped);
    assert_eq!(handle.health().stalled, None);
    assert_eq!(handle.submit(probe()).err(), Some(SubmitError::Draining));
}

#[test]
fn an_engine_without_handles_stops() {
    let config = roomy();
    let metrics = std::sync::Arc::new(Metrics::new("m"));
    let model = model(cpu(), "tiny-routed", &config);
    let (handle, thread) = Engine::spawn(model, &config, metrics).unwrap();
    let mut stream = handle.submit(probe()).unwrap();
    drop(handle);
    let mut tokens = 0;
    while let Some(event) = stream.next_blocking() {
        tokens += usize::from(matches!(event, midpo::engine::Event::Token { .. }));
    }
    assert_eq!(tokens, 24);
    assert_eq!(thread.join(), EngineState::Stopped);
}
