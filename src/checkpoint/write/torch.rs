//! `torch.save`'s file of a dict of state dicts: a zip of one pickle and a record for each tensor, which `torch.load` reads with
//! `weights_only=True`. The pickle's opcodes are those that [`crate::checkpoint::pickle`] reads.

use std::io::{Seek, Write};

use zip::write::{SimpleFileOptions, ZipWriter};

use super::safetensors::le_bytes;

/// Folder of all records: torch names it after the file.
const FOLDER: &str = "router";
/// Of torch's format of files.
const VERSION: &[u8] = b"3\n";
/// Where torch aligns records, so that it can map them.
const RECORD_ALIGNMENT: u16 = 64;

/// Name, row-major axes and numbers of a tensor of a state dict.
pub(super) type State<'a> = (&'a str, &'a [usize], &'a [f32]);

/// Writes the file: state dicts by name, in order.
///
/// # Errors
/// Those of `out`.
pub(super) fn write(
    out: impl Write + Seek,
    dicts: &[(String, Vec<State<'_>>)],
) -> std::io::Result<()> {
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .with_alignment(RECORD_ALIGNMENT);
    let mut zip = ZipWriter::new(out);
    let mut record = |name: &str, bytes: &[u8]| {
        zip.start_file(format!("{FOLDER}/{name}"), options)?;
        zip.write_all(bytes)
    };
    record("data.pkl", &pickled(dicts))?;
    record("byteorder", b"little")?;
    let tensors = dicts.iter().flat_map(|(_, state)| state);
    for (key, (_, _, values)) in tensors.enumerate() {
        record(&format!("data/{key}"), &le_bytes(values))?;
    }
    record("version", VERSION)?;
    zip.finish()?.flush()
}

fn pickled(dicts: &[(String, Vec<State<'_>>)]) -> Vec<u8> {
    let mut pickle = Pickle(b"\x80\x02}(".to_vec());
    let mut key = 0;
    for (name, state) in dicts {
        pickle.text(name);
        pickle.empty_ordered_dict();
        pickle.0.push(b'(');
        for (name, shape, values) in state {
            pickle.text(name);
            pickle.tensor(key, shape, values.len());
            key += 1;
        }
        pickle.0.push(b'u');
    }
    pickle.0.extend(b"u.");
    pickle.0
}

/// A pickle as it grows, in protocol 2 and without memo.
struct Pickle(Vec<u8>);

impl Pickle {
    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn int(&mut self, int: usize) {
        match i32::try_from(int) {
            Ok(int) => {
                self.0.push(b'J');
                self.0.extend(int.to_le_bytes());
            }
            Err(_) => {
                self.0.extend([0x8a, 8]);
                self.0.extend((int as u64).to_le_bytes());
            }
        }
    }

    fn tuple(&mut self, ints: impl Iterator<Item = usize>) {
        self.0.push(b'(');
        ints.for_each(|int| self.int(int));
        self.0.push(b't');
    }

    fn global(&mut self, module: &str, name: &str) {
        self.0.extend(format!("c{module}\n{name}\n").as_bytes());
    }

    fn empty_ordered_dict(&mut self) {
        self.global("collections", "OrderedDict");
        self.0.extend(b")R");
    }

    /// `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, the storage by its persistent id.
    fn tensor(&mut self, key: usize, shape: &[usize], elements: usize) {
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.0.extend(b"((");
        self.text("storage");
        self.global("torch", "FloatStorage");
        self.text(&key.to_string());
        self.text("cpu");
        self.int(elements);
        self.0.extend(b"tQ");
        self.int(0);
        self.tuple(shape.iter().copied());
        let mut stride = elements;
        let strides = shape.iter().map(|axis| {
            stride /= (*axis).max(1);
            stride
        });
        self.tuple(strides);
        self.0.push(0x89);
        self.empty_ordered_dict();
        self.0.extend(b"tR");
    }
}
