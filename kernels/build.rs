//! With the `cuda` feature: compiles `kernels/*.cu` into fatbins for the binary to hold. Without it there is nothing to do.
//!
//! nvcc is looked for at NVCC, CUDA_HOME, CUDA_PATH, /usr/local/cuda and in PATH. Where there is none, the crate can be checked but not
//! built: `src/backend/device` says so. MIDPO_CUDA_ARCHS=90a makes a quick build for one GPU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// An image a GPU generation, and PTX of the oldest for the driver to compile for those that are not listed.
const ARCHS: &str = "80,90a,100";

fn main() {
    println!("cargo::rerun-if-changed=kernels/build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "MIDPO_CUDA_ARCHS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let nvcc = find_nvcc();
    let kernels = match starts(&nvcc) {
        true => kernels(),
        false => {
            println!(
                "cargo::warning=`{}` did not start: the crate can be checked, not built, with the cuda feature. Install the CUDA 13 \
                 toolkit, or set NVCC or CUDA_HOME",
                nvcc.display()
            );
            Vec::new()
        }
    };
    for kernel in &kernels {
        if let Err(reason) = compile(&nvcc, kernel, &out) {
            eprintln!("{reason}");
            std::process::exit(1);
        }
    }
    fs::write(out.join("fatbins.rs"), table(&kernels))
        .unwrap_or_else(|error| panic!("fatbins.rs: {error}"));
}

fn find_nvcc() -> PathBuf {
    if let Some(path) = env::var_os("NVCC") {
        return path.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    let homes = homes.map(PathBuf::from).chain(["/usr/local/cuda".into()]);
    let found = homes
        .map(|home| home.join("bin/nvcc"))
        .find(|path| path.exists());
    found.unwrap_or_else(|| "nvcc".into())
}

fn starts(nvcc: &Path) -> bool {
    let version = Command::new(nvcc).arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

fn kernels() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut kernels: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu"))
        .collect();
    kernels.sort();
    kernels
}

/// `OUT/NAME.fatbin` of `kernels/NAME.cu`, and ptxas' report beside it.
fn compile(nvcc: &Path, kernel: &Path, out: &Path) -> Result<(), String> {
    let archs = env::var("MIDPO_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.to_owned());
    let archs: Vec<&str> = archs.split(',').map(str::trim).collect();
    let oldest = archs[0].trim_end_matches(char::is_alphabetic);
    let image = out
        .join(kernel.file_stem().unwrap_or_default())
        .with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command.args([
        "-O3",
        "-std=c++17",
        "-fatbin",
        "-lineinfo",
        "-Xptxas",
        "-v",
        "-Xfatbin",
        "-compress-all",
        "--threads",
        "0",
    ]);
    for arch in &archs {
        command.args(["-gencode", &format!("arch=compute_{arch},code=sm_{arch}")]);
    }
    command.args([
        "-gencode",
        &format!("arch=compute_{oldest},code=compute_{oldest}"),
    ]);
    command.arg("-o").arg(&image).arg(kernel);
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{command:?} failed:\n{report}"));
    }
    fs::write(image.with_extension("ptxas.txt"), report.as_bytes())
        .map_err(|error| error.to_string())
}

/// What `src/backend/device` includes. The assertion is evaluated when code is generated, not when it is checked.
fn table(kernels: &[PathBuf]) -> String {
    let names = kernels
        .iter()
        .filter_map(|kernel| kernel.file_stem()?.to_str());
    let images = names.map(|name| {
        format!("    include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\")),\n")
    });
    format!(
        "const NO_KERNELS: bool = {};\n\
         fn fatbins<const NO_KERNELS: bool>() -> &'static [&'static [u8]] {{\n\
         const {{ assert!(!NO_KERNELS, \"the cuda feature needs nvcc: install the CUDA 13 toolkit, or set NVCC or CUDA_HOME\") }};\n\
         &[\n{}]\n}}\n",
        kernels.is_empty(),
        images.collect::<String>()
    )
}
