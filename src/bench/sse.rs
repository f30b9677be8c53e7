//! Server-sent events out of bytes that arrive in any pieces (WHATWG HTML, 9.2.6 "Interpreting an event stream").

use std::mem;

/// Longest event (its data, or one line) that is kept; an OpenAI chunk is well under a kilobyte.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

/// One event: its `data` lines, joined by newlines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SseEvent {
    /// `event:`; empty where the stream names none.
    pub kind: String,
    /// `data:`.
    pub data: String,
}

/// What is no event stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line, or the data of an event, has no end.
    #[error("an event of the stream is longer than {limit} bytes")]
    TooLong {
        /// [`EVENT_BYTES_MAX`].
        limit: usize,
    },
}

/// Turns bytes into events. Invariant: what it yields depends on the bytes fed so far, never on where they were split.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    after: LineEnd,
    kind: Vec<u8>,
    data: Option<Vec<u8>>,
    started: bool,
}

/// What ended the previous line: a line feed right behind a carriage return belongs to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LineEnd {
    #[default]
    LineFeed,
    CarriageReturn,
}

impl SseParser {
    /// Takes in the next bytes of the body; complete events are appended to `events`.
    ///
    /// # Errors
    /// [`SseError::TooLong`]: the stream is then of no more use.
    pub fn feed(&mut self, bytes: &[u8], events: &mut Vec<SseEvent>) -> Result<(), SseError> {
        let mut rest = bytes;
        while let Some(first) = rest.first() {
            if *first == b'\n' && mem::take(&mut self.after) == LineEnd::CarriageReturn {
                rest = &rest[1..];
                continue;
            }
            self.after = LineEnd::LineFeed;
            let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let (part, ended) = rest.split_at(end.unwrap_or(rest.len()));
            bounded(self.line.len() + part.len())?;
            self.line.extend_from_slice(part);
            if let Some((end, behind)) = ended.split_first() {
                if *end == b'\r' {
                    self.after = LineEnd::CarriageReturn;
                }
                let line = mem::take(&mut self.line);
                self.end_line(&line, events)?;
                rest = behind;
            } else {
                rest = ended;
            }
        }
        Ok(())
    }

    fn end_line(&mut self, line: &[u8], events: &mut Vec<SseEvent>) -> Result<(), SseError> {
        let line = if mem::replace(&mut self.started, true) {
            line
        } else {
            line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line)
        };
        if line.is_empty() {
            let kind = text(&mem::take(&mut self.kind));
            events.extend(self.data.take().map(|data| SseEvent {
                kind,
                data: text(&data),
            }));
            return Ok(());
        }
        let colon = line.iter().position(|byte| *byte == b':');
        let (field, value) = line.split_at(colon.unwrap_or(line.len()));
        let value = value.strip_prefix(b":").unwrap_or(value);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"data" => self.append(value),
            b"event" => {
                self.kind = value.to_vec();
                Ok(())
            }
            // Comments (an empty name), `id` and `retry` say nothing about tokens.
            _ => Ok(()),
        }
    }

    fn append(&mut self, value: &[u8]) -> Result<(), SseError> {
        match &mut self.data {
            None => self.data = Some(value.to_vec()),
            Some(data) => {
                bounded(data.len() + 1 + value.len())?;
                data.push(b'\n');
                data.extend_from_slice(value);
            }
        }
        Ok(())
    }
}

fn bounded(bytes: usize) -> Result<(), SseError> {
    if bytes > EVENT_BYTES_MAX {
        return Err(SseError::TooLong {
            limit: EVENT_BYTES_MAX,
        });
    }
    Ok(())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn parse(pieces: &[&[u8]]) -> Vec<(String, String)> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for piece in pieces {
            parser.feed(piece, &mut events).unwrap();
        }
        events.into_iter().map(|e| (e.kind, e.data)).collect()
    }

    fn check(stream: &str, want: &[(&str, &str)]) {
        let bytes = stream.as_bytes();
        let want: Vec<(String, String)> = want
            .iter()
            .map(|(kind, data)| ((*kind).to_owned(), (*data).to_owned()))
            .collect();
        for split in 0..=bytes.len() {
            let (head, tail) = bytes.split_at(split);
            assert_eq!(parse(&[head, tail]), want, "{stream:?} split at {split}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(parse(&single), want, "{stream:?} byte by byte");
    }

    #[test]
    fn feed_yields_the_same_events_wherever_the_bytes_are_split() {
        check("data: {\"a\":1}\n\n", &[("", "{\"a\":1}")]);
        check("data: a\r\n\r\ndata: b\r\n\r\n", &[("", "a"), ("", "b")]);
        check("data: a\r\rdata:b\r\r", &[("", "a"), ("", "b")]);
        check("data: a\ndata: b\n\n", &[("", "a\nb")]);
        check(": keep-alive\n\ndata: x\n\n", &[("", "x")]);
        check("event: error\ndata: é€😀\n\n", &[("error", "é€😀")]);
        check("\u{feff}data: bom\n\n", &[("", "bom")]);
        check("data\n\nid: 7\nretry: 1\n\n", &[("", "")]);
        check("data:  two spaces\n\n", &[("", " two spaces")]);
        check("data: [DONE]\n\ndata: cut", &[("", "[DONE]")]);
        check("event: lost\n\ndata: a\n\n", &[("", "a")]);
        check("", &[]);
    }

    #[test]
    fn feed_when_a_line_never_ends_is_an_error() {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        let long = vec![b'a'; EVENT_BYTES_MAX];
        parser.feed(&long, &mut events).unwrap();
        let limit = EVENT_BYTES_MAX;
        let error = parser.feed(b"a", &mut events);
        assert_eq!(error, Err(SseError::TooLong { limit }));
    }

    proptest! {
        #[test]
        fn feed_of_any_bytes_in_any_pieces_equals_feed_of_the_whole(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), Just(b' '), Just(b'd'), any::<u8>()], 0..200),
            pieces in proptest::collection::vec(1usize..20, 1..50),
        ) {
            let mut rest = bytes.as_slice();
            let mut parts = Vec::new();
            for size in pieces.iter().cycle() {
                if rest.is_empty() { break; }
                let (part, behind) = rest.split_at((*size).min(rest.len()));
                parts.push(part);
                rest = behind;
            }
            prop_assert_eq!(parse(&parts), parse(&[&bytes]));
        }
    }
}
