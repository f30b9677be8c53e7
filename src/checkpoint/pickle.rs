//! A reader of the few pickles that `torch.save` writes for a dict of tensors. It builds tensors and plain containers, and
//! refuses everything else: it cannot call anything, because no opcode here does.
//!
//! Values live in one arena and refer to each other by index. So a memo entry is never copied, nothing is walked or dropped
//! recursively, and memory is bounded by the pickle's length: an opcode makes at most one value, and moves those on the stack.

use std::collections::HashMap;
use std::ops::Range;

use crate::dtype::DType;

/// Characters of a name that an error repeats.
const SHOWN_MAX: usize = 60;

/// A value of the arena that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ValueId(usize);

/// What a value is.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(#[allow(dead_code, reason = "no router looks at one, but its flags are read")] bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(#[allow(dead_code, reason = "no router looks at one")] f64),
    /// Text: where it is in the pickle.
    Str(Range<usize>),
    /// A tuple.
    Tuple(Vec<ValueId>),
    /// A list.
    List(Vec<ValueId>),
    /// A `dict` or an `OrderedDict`.
    Dict(Vec<(ValueId, ValueId)>),
    /// One of the names that may be spoken.
    Global(Global),
    /// A storage, by its persistent id. Boxed, as tensors are: most values are small, and a pickle is mostly values.
    Storage(Box<Storage>),
    /// A view of a storage.
    Tensor(Box<TensorView>),
}

/// The names that a pickle may speak. None of them is code here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch.FloatStorage` and its like.
    Storage(StorageType),
}

/// Element type of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StorageType {
    /// A format that tensors of ours can have.
    Plain(DType),
    /// f64: rounded to f32 when it is read.
    Double,
}

impl StorageType {
    /// Bytes of an element.
    pub(crate) fn element_bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.block_bytes(),
            Self::Double => 8,
        }
    }
}

/// A record of the archive, and what the pickle claims of it.
#[derive(Clone, Debug)]
pub(crate) struct Storage {
    /// Element type.
    pub(crate) storage_type: StorageType,
    /// The record's name: where it is in the pickle.
    pub(crate) key: Range<usize>,
    /// Elements, as claimed.
    pub(crate) elements: i64,
}

/// The arguments of `_rebuild_tensor_v2`, as claimed.
#[derive(Clone, Debug)]
pub(crate) struct TensorView {
    /// A [`Value::Storage`].
    pub(crate) storage: ValueId,
    /// In elements.
    pub(crate) offset: i64,
    /// Axes.
    pub(crate) shape: Vec<i64>,
    /// In elements, one an axis.
    pub(crate) strides: Vec<i64>,
}

/// A pickle that has been read.
#[derive(Debug)]
pub(crate) struct Pickle<'a> {
    bytes: &'a [u8],
    values: Vec<Value>,
    root: ValueId,
}

impl Pickle<'_> {
    /// The object that was saved.
    pub(crate) fn root(&self) -> &Value {
        self.value(self.root)
    }

    /// What an id of this pickle stands for.
    pub(crate) fn value(&self, id: ValueId) -> &Value {
        self.values.get(id.0).unwrap_or(&Value::None)
    }

    /// The text at a range of this pickle.
    pub(crate) fn text(&self, range: &Range<usize>) -> &str {
        text(self.bytes, range)
    }
}

fn text<'a>(bytes: &'a [u8], range: &Range<usize>) -> &'a str {
    let bytes = bytes.get(range.clone()).unwrap_or_default();
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Reads a pickle. The caller has bounded its length.
///
/// # Errors
/// What was expected, what came, and at which byte.
pub(crate) fn read(bytes: &[u8]) -> Result<Pickle<'_>, String> {
    let mut reader = Reader {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        let at = reader.at;
        let step = reader.step();
        match step.map_err(|reason| format!("pickle, byte {at}: {reason}"))? {
            Step::On => {}
            Step::Done(root) => {
                return Ok(Pickle {
                    bytes,
                    values: reader.values,
                    root,
                });
            }
        }
    }
}

enum Step {
    On,
    Done(ValueId),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<ValueId>,
    /// Heights of the stack where a MARK was set.
    marks: Vec<usize>,
    memo: HashMap<u32, ValueId>,
}

impl Reader<'_> {
    /// One opcode. The table of all that there are: long, and one line of thought.
    fn step(&mut self) -> Result<Step, String> {
        let [opcode] = self.take_array()?;
        match opcode {
            b'.' => return self.pop().map(Step::Done),
            0x80 => match self.take_array()? {
                [2] => {}
                [protocol] => return Err(format!("expected protocol 2, found {protocol}")),
            },
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' => {
                let int = i32::from_le_bytes(self.take_array()?);
                self.push(Value::Int(int.into()));
            }
            b'K' => {
                let [int] = self.take_array()?;
                self.push(Value::Int(int.into()));
            }
            b'M' => {
                let int = u16::from_le_bytes(self.take_array()?);
                self.push(Value::Int(int.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                let float = f64::from_be_bytes(self.take_array()?);
                self.push(Value::Float(float));
            }
            b'X' => self.unicode()?,
            b')' => self.push(Value::Tuple(Vec::new())),
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'q' => {
                let [index] = self.take_array()?;
                self.put(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(self.take_array()?);
                self.put(index)?;
            }
            b'h' => {
                let [index] = self.take_array()?;
                self.get(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.take_array()?);
                self.get(index)?;
            }
            b'c' => self.global()?,
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            other => {
                return Err(format!(
                    "expected an opcode that torch.save writes for tensors in dicts, found {:?} (0x{other:02x})",
                    char::from(other)
                ));
            }
        }
        Ok(Step::On)
    }

    fn take(&mut self, count: usize) -> Result<Range<usize>, String> {
        let left = self.bytes.len() - self.at.min(self.bytes.len());
        if count > left {
            return Err(format!("expected {count} more bytes, found {left}"));
        }
        let range = self.at..self.at + count;
        self.at += count;
        Ok(range)
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let range = self.take(N)?;
        let bytes = self.bytes.get(range).and_then(|bytes| bytes.first_chunk());
        bytes
            .copied()
            .ok_or_else(|| format!("expected {N} more bytes"))
    }

    fn push(&mut self, value: Value) {
        self.stack.push(ValueId(self.values.len()));
        self.values.push(value);
    }

    /// The top of the stack, but nothing below the last MARK.
    fn pop(&mut self) -> Result<ValueId, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("expected a value on the stack, found none".to_owned());
        }
        self.stack
            .pop()
            .ok_or_else(|| "expected a value on the stack".to_owned())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<ValueId>, String> {
        let mark = self.marks.pop().ok_or("expected a mark, found none")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn value(&self, id: ValueId) -> &Value {
        self.values.get(id.0).unwrap_or(&Value::None)
    }

    /// The value under whatever was just popped.
    fn top(&mut self) -> Result<&mut Value, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let id = self.stack.get(floor..).and_then(<[_]>::last);
        id.and_then(|id| self.values.get_mut(id.0))
            .ok_or_else(|| "expected a value on the stack, found none".to_owned())
    }

    fn tuple(&mut self, count: usize) -> Result<(), String> {
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items));
        Ok(())
    }

    fn append(&mut self, items: Vec<ValueId>) -> Result<(), String> {
        match self.top()? {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err("expected a list to append to".to_owned()),
        }
    }

    fn set_items(&mut self, items: &[ValueId]) -> Result<(), String> {
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("expected keys and values in pairs".to_owned());
        };
        match self.top()? {
            Value::Dict(dict) => {
                dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                Ok(())
            }
            _ => Err("expected a dict to set items of".to_owned()),
        }
    }

    fn put(&mut self, index: u32) -> Result<(), String> {
        let id = self.pop()?;
        self.stack.push(id);
        self.memo.insert(index, id);
        Ok(())
    }

    fn get(&mut self, index: u32) -> Result<(), String> {
        let id = self
            .memo
            .get(&index)
            .ok_or_else(|| format!("expected a memo entry {index}, found none"))?;
        self.stack.push(*id);
        Ok(())
    }

    /// LONG1: 0 to 8 bytes of two's complement; sizes beyond 64 bits are no sizes.
    fn long(&mut self) -> Result<(), String> {
        let [count] = self.take_array()?;
        if count > 8 {
            return Err(format!(
                "expected a number of at most 8 bytes, found {count}"
            ));
        }
        let range = self.take(count.into())?;
        let bytes = self.bytes.get(range).unwrap_or_default();
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        for (to, from) in number.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.push(Value::Int(i64::from_le_bytes(number)));
        Ok(())
    }

    fn unicode(&mut self) -> Result<(), String> {
        let length = u32::from_le_bytes(self.take_array()?);
        let length = usize::try_from(length).map_err(|error| error.to_string())?;
        let range = self.take(length)?;
        let bytes = self.bytes.get(range.clone()).unwrap_or_default();
        std::str::from_utf8(bytes).map_err(|error| format!("expected UTF-8: {error}"))?;
        self.push(Value::Str(range));
        Ok(())
    }

    /// A line without its end, escaped and cut for messages.
    fn line(&mut self) -> Result<String, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or("expected a line, found no end of it")?;
        let line = rest.get(..length.min(SHOWN_MAX)).unwrap_or_default();
        let line = line.escape_ascii().to_string();
        self.at += length + 1;
        Ok(line)
    }

    fn global(&mut self) -> Result<(), String> {
        let (module, name) = (self.line()?, self.line()?);
        let plain = |dtype| Global::Storage(StorageType::Plain(dtype));
        let global = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch", "FloatStorage") => plain(DType::F32),
            ("torch", "HalfStorage") => plain(DType::F16),
            ("torch", "BFloat16Storage") => plain(DType::BF16),
            ("torch", "DoubleStorage") => Global::Storage(StorageType::Double),
            _ => {
                return Err(format!(
                    "refused `{module}.{name}`: expected only tensors of f64, f32, f16 or bf16, and dicts of them"
                ));
            }
        };
        self.push(Value::Global(global));
        Ok(())
    }

    /// `('storage', type, key, location, elements)`. The location (`cpu`, `cuda:0`) says where it was, which does not matter.
    fn persistent(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let storage = match self.value(id) {
            Value::Tuple(items) => self.storage(items),
            _ => None,
        };
        let storage =
            storage.ok_or("expected the persistent id of a storage of f64, f32, f16 or bf16")?;
        self.push(Value::Storage(Box::new(storage)));
        Ok(())
    }

    fn storage(&self, items: &[ValueId]) -> Option<Storage> {
        let [tag, storage_type, key, _location, elements] = items else {
            return None;
        };
        let Value::Str(tag) = self.value(*tag) else {
            return None;
        };
        match (
            self.value(*storage_type),
            self.value(*key),
            self.value(*elements),
        ) {
            (
                Value::Global(Global::Storage(storage_type)),
                Value::Str(key),
                Value::Int(elements),
            ) if text(self.bytes, tag) == "storage" => Some(Storage {
                storage_type: *storage_type,
                key: key.clone(),
                elements: *elements,
            }),
            _ => None,
        }
    }

    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = self.value(arguments) else {
            return Err("expected a tuple of arguments".to_owned());
        };
        let value = match self.value(function) {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => Value::Dict(Vec::new()),
            Value::Global(Global::OrderedDict) => {
                return Err("expected OrderedDict without arguments".to_owned());
            }
            Value::Global(Global::RebuildTensor) => {
                let expected =
                    "expected (storage, offset, shape, strides, requires_grad, hooks) for a tensor";
                Value::Tensor(Box::new(self.tensor(arguments).ok_or(expected)?))
            }
            _ => return Err("expected OrderedDict or _rebuild_tensor_v2 to be called".to_owned()),
        };
        self.push(value);
        Ok(())
    }

    fn tensor(&self, arguments: &[ValueId]) -> Option<TensorView> {
        // torch writes six arguments, and a dict of metadata as a seventh where there is some.
        let ([storage, offset, shape, strides, _grad, _hooks]
        | [storage, offset, shape, strides, _grad, _hooks, _]) = arguments
        else {
            return None;
        };
        match (self.value(*storage), self.value(*offset)) {
            (Value::Storage(_), Value::Int(offset)) => Some(TensorView {
                storage: *storage,
                offset: *offset,
                shape: self.ints(*shape)?,
                strides: self.ints(*strides)?,
            }),
            _ => None,
        }
    }

    fn ints(&self, tuple: ValueId) -> Option<Vec<i64>> {
        // A tuple may be in the memo and long: axes beyond this are no tensor's, and are not copied again and again.
        const AXES_MAX: usize = 8;
        let Value::Tuple(items) = self.value(tuple) else {
            return None;
        };
        if items.len() > AXES_MAX {
            return None;
        }
        items
            .iter()
            .map(|item| match self.value(*item) {
                Value::Int(int) => Some(*int),
                _ => None,
            })
            .collect()
    }

    /// The state of a module's dict is bookkeeping (`_metadata`): read, and left.
    fn build(&mut self) -> Result<(), String> {
        let state = self.pop()?;
        if !matches!(self.value(state), Value::Dict(_)) {
            return Err("expected a dict of attributes".to_owned());
        }
        match self.top()? {
            Value::Dict(_) => Ok(()),
            _ => Err("expected attributes of a dict only".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn check_refused(bytes: &[u8], want: &str) {
        let error = read(bytes).unwrap_err();
        assert!(error.contains(want), "{bytes:?}: {error}");
    }

    #[test]
    fn read_when_the_pickle_is_no_dict_of_tensors_says_where_and_why() {
        for (bytes, want) in [
            (&b""[..], "byte 0: expected 1 more bytes"),
            (b"\x80\x04.", "protocol 2, found 4"),
            (b"\x80\x02.", "byte 2: expected a value"),
            (b"\x80\x02t.", "expected a mark"),
            (b"\x80\x02(\x85.", "expected a value"),
            (b"\x80\x02N(q\x00.", "expected a value"),
            (b"\x80\x02h\x07.", "memo entry 7"),
            (
                b"\x80\x02X\xff\xff\xff\xffab",
                "expected 4294967295 more bytes, found 2",
            ),
            (b"\x80\x02X\x01\x00\x00\x00\xff.", "UTF-8"),
            (b"\x80\x02cos\nsystem\n.", "`os.system`"),
            (b"\x80\x02cos\nsystem", "no end of it"),
            (
                b"\x80\x02ccollections\nOrderedDict\nN\x85R.",
                "without arguments",
            ),
            (b"\x80\x02N)R.", "to be called"),
            (b"\x80\x02NN\x86Q.", "persistent id"),
            (b"\x80\x02)NNs.", "a dict to set"),
            (b"\x80\x02}(Nu.", "pairs"),
            (b"\x80\x02}Na.", "a list"),
            (b"\x80\x02N}b.", "attributes of a dict only"),
            (b"\x80\x02\x8a\x09aaaaaaaaa.", "at most 8 bytes"),
            (b"\x80\x02\x93.", "0x93"),
        ] {
            check_refused(bytes, want);
        }
    }

    #[test]
    fn read_when_the_pickle_holds_plain_values_builds_them() {
        let pickle =
            read(b"\x80\x02}(X\x01\x00\x00\x00aJ\xff\xff\xff\xffK\x07\x8a\x03\x00\x00\x80u.")
                .unwrap();
        let Value::Dict(items) = pickle.root() else {
            panic!("{:?}", pickle.root());
        };
        let ints: Vec<_> = items
            .iter()
            .map(|(_, value)| match pickle.value(*value) {
                Value::Int(int) => *int,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ints, [-1, -8_388_608]);
        assert!(matches!(pickle.value(items[0].0), Value::Str(range) if pickle.text(range) == "a"));
    }
}
