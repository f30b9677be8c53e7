//! Compiles the emulator, the crate's kernels (`../*.cu`) and the faulty ones with the host's C++ compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=..");
    println!("cargo::rustc-check-cfg=cfg(no_compiler)");
    let compiler = cc::Build::new().cpp(true).get_compiler();
    if let Err(reason) = starts(compiler.path()) {
        println!("cargo::rustc-cfg=no_compiler");
        println!("cargo::warning={reason}");
        // A path that is not there: cargo asks again at the next build.
        println!("cargo::rerun-if-changed=compiler");
        return;
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .define("MIDPO_EMU", None)
        .include(".")
        .include("..")
        // The .cu suffix means nothing to the compiler; `-x c++` also covers the .cpp that follows.
        .flag("-xc++")
        .flag("-Wno-unknown-pragmas")
        // Device code puns between vector types and bf16 freely, as CUDA allows.
        .flag("-fno-strict-aliasing")
        // What the device would fault on or silently get wrong: misaligned vector access, int overflow in
        // an index, an array bound. Trapping needs no sanitizer runtime at link time.
        .flag("-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero")
        .flag("-fsanitize-undefined-trap-on-error")
        // nvcc contracts a * b + c on its own terms; keep the host's arithmetic as written.
        .flag("-ffp-contract=off")
        .file("cuda_emu.cpp")
        .file("faulty.cu")
        .files(kernels(Path::new("..")))
        // Kernels are found by name at run time: no symbol asks for their objects.
        .link_lib_modifier("+whole-archive")
        .compile("cuda_emu_kernels");
}

fn kernels(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("kernels/").flatten();
    let mut kernels: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu"))
        .collect();
    kernels.sort();
    kernels
}

/// # Errors
/// One line that says what is left out and what to install.
fn starts(compiler: &Path) -> Result<(), String> {
    if Command::new(compiler).arg("--version").output().is_ok() {
        return Ok(());
    }
    let tried = compiler.display();
    let variable = env::var("CXX").map_or("", |_| " (from CXX)");
    Err(format!(
        "the tests that run CUDA kernels on the CPU are left out: the C++ compiler `{tried}`{variable} did not start. \
         Install g++ or clang++ (C++17), or set CXX"
    ))
}
