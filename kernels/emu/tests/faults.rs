//! The mistakes that the emulator must not let pass: `faulty.cu` has a kernel for each.

#![cfg(not(no_compiler))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use cuda_emu::{Arg, EmuError, Launch, Memory, Schedule};

fn run(kernel: &str, threads: u32, schedule: Schedule, args: &[Arg]) -> Result<(), EmuError> {
    let launch = Launch {
        kernel,
        grid: [2, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 1024,
        schedule,
    };
    // SAFETY: every test hands over buffers as large as its kernel needs, but where that is the fault.
    unsafe { launch.run(args) }
}

fn numbers(memory: &Memory) -> Vec<i32> {
    let words = memory.as_slice().as_chunks::<4>().0;
    words.iter().map(|word| i32::from_le_bytes(*word)).collect()
}

fn counting(len: i32) -> Memory {
    let mut memory = Memory::new(4 * len as usize);
    let bytes: Vec<u8> = (0..len).flat_map(i32::to_le_bytes).collect();
    memory.as_mut_slice().copy_from_slice(&bytes);
    memory
}

/// The error of a kernel that writes `out` of 64 numbers.
fn error(kernel: &str) -> String {
    let out = Memory::new(256);
    run(
        kernel,
        32,
        Schedule::Ascending,
        &[Arg::Pointer(out.address())],
    )
    .unwrap_err()
    .0
}

#[test]
fn missing_barrier_shows_in_poison_and_in_schedules() {
    let run = |schedule| {
        let out = Memory::new(64 * 4);
        run(
            "faulty_missing_barrier",
            64,
            schedule,
            &[Arg::Pointer(out.address())],
        )
        .unwrap();
        numbers(&out)
    };
    let ascending = run(Schedule::Ascending);
    assert_eq!(
        ascending[0], -1,
        "the neighbour's slot still holds the poison"
    );
    assert_ne!(ascending, run(Schedule::Descending));
}

#[test]
fn racing_blocks_show_in_schedules() {
    let run = |schedule| {
        let out = Memory::new(4);
        run(
            "faulty_racing_blocks",
            32,
            schedule,
            &[Arg::Pointer(out.address())],
        )
        .unwrap();
        numbers(&out)
    };
    assert_ne!(run(Schedule::Ascending), run(Schedule::Descending));
}

#[test]
fn divergent_barrier_is_a_deadlock() {
    let error = error("faulty_divergent_barrier");
    assert!(error.contains("deadlock: 32 of 32 threads wait"), "{error}");
    assert!(error.contains("thread 0 waits at __syncthreads"), "{error}");
}

#[test]
fn collective_that_lanes_disagree_on_is_named() {
    let error = error("faulty_partial_mma");
    assert!(
        error.contains("__shfl_sync") && error.contains("mma.m16n8k16"),
        "{error}"
    );
}

#[test]
fn missing_and_weak_waits_read_poison() {
    let input = counting(128);
    for kernel in ["faulty_missing_wait", "faulty_weak_wait"] {
        let out = Memory::new(32 * 4);
        let args = [Arg::Pointer(out.address()), Arg::Pointer(input.address())];
        run(kernel, 32, Schedule::Ascending, &args).unwrap();
        assert_eq!(numbers(&out), [-1; 32], "{kernel}");
    }
}

#[test]
fn misaligned_copies_and_matrices_are_errors() {
    let input = counting(128);
    let copy = run(
        "faulty_misaligned_copy",
        32,
        Schedule::Ascending,
        &[Arg::Pointer(input.address())],
    );
    assert!(copy.unwrap_err().0.contains("not aligned"));
    let error = error("faulty_misaligned_ldmatrix");
    assert!(error.contains("not 16-byte aligned"), "{error}");
}

#[test]
fn launches_are_checked_against_limits_names_and_signatures() {
    let out = Memory::new(256);
    let (pointer, count) = (Arg::Pointer(out.address()), Arg::I32(8));
    let checked = [
        (
            "faulty_misaligned",
            2048,
            &[pointer][..],
            "block dimensions",
        ),
        (
            "no_such_kernel",
            32,
            &[pointer],
            "no kernel is called no_such_kernel",
        ),
        (
            "faulty_out_of_bounds",
            32,
            &[pointer],
            "takes (pi), launched with (p)",
        ),
        (
            "faulty_out_of_bounds",
            32,
            &[pointer, Arg::F32(8.0)],
            "takes (pi), launched with (pf)",
        ),
        (
            "faulty_out_of_bounds",
            32,
            &[count, pointer],
            "takes (pi), launched with (ip)",
        ),
    ];
    for (kernel, threads, args, want) in checked {
        let error = run(kernel, threads, Schedule::Ascending, args)
            .unwrap_err()
            .0;
        assert!(error.contains(want), "{error}");
    }
}

/// Runs the test that calls it once more in a process of its own, where `crash` must end it; returns what it wrote to stderr.
fn crash(test: &str, crash: impl Fn()) -> Option<String> {
    const CRASHING: &str = "CUDA_EMU_CRASHING";
    if std::env::var_os(CRASHING).is_some() {
        crash();
        return None;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", test])
        .env(CRASHING, "1")
        .output()
        .unwrap();
    assert!(!output.status.success(), "{test} survived");
    Some(String::from_utf8(output.stderr).unwrap())
}

#[test]
fn access_past_the_end_ends_the_process_and_names_the_thread() {
    let text = crash(
        "access_past_the_end_ends_the_process_and_names_the_thread",
        || {
            let out = Memory::new(32 * 4);
            let args = [Arg::Pointer(out.address()), Arg::I32(32)];
            run("faulty_out_of_bounds", 64, Schedule::Ascending, &args).unwrap();
        },
    );
    if let Some(text) = text {
        assert!(
            text.contains("invalid access") && text.contains("block (0,0,0) thread (32,0,0)"),
            "{text}"
        );
    }
}

#[test]
fn misaligned_access_ends_the_process_and_names_the_thread() {
    let text = crash(
        "misaligned_access_ends_the_process_and_names_the_thread",
        || {
            let out = Memory::new(32);
            run(
                "faulty_misaligned",
                1,
                Schedule::Ascending,
                &[Arg::Pointer(out.address())],
            )
            .unwrap();
        },
    );
    if let Some(text) = text {
        assert!(
            text.contains("misaligned") && text.contains("thread (0,0,0)"),
            "{text}"
        );
    }
}

#[test]
fn overflowing_index_ends_the_process() {
    let text = crash("overflowing_index_ends_the_process", || {
        let out = Memory::new(128);
        let args = [Arg::Pointer(out.address()), Arg::I32(65536)];
        run("faulty_overflow", 1, Schedule::Ascending, &args).unwrap();
    });
    if let Some(text) = text {
        assert!(text.contains("overflowing"), "{text}");
    }
}
