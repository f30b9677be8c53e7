//! Stop strings, which may span tokens.

/// Finds stop strings in text that comes in pieces. Invariant: text that is held back begins some stop string; text that was
/// let go is part of none.
///
/// The match that is complete first wins, and of those complete at the same byte the longest: so the answer does not depend on
/// how the text was cut into pieces.
#[derive(Clone, Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    include: bool,
    /// A suffix of the text so far: the longest that begins a stop string.
    held: String,
}

/// A stop string, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Which of the strings given.
    pub index: usize,
}

/// Knuth, Morris and Pratt: `fallback[i]` is the length of the longest proper border of the first `i + 1` bytes.
#[derive(Clone, Debug)]
struct Pattern {
    index: usize,
    bytes: Vec<u8>,
    fallback: Vec<usize>,
    matched: usize,
}

impl StopStrings {
    /// Empty strings never match. `include`: the stop string itself is part of the text.
    pub fn new(strings: &[String], include: bool) -> Self {
        let patterns = strings
            .iter()
            .enumerate()
            .filter(|(_, string)| !string.is_empty())
            .map(|(index, string)| Pattern::new(index, string))
            .collect();
        Self {
            patterns,
            include,
            held: String::new(),
        }
    }

    /// Takes more text. Returns what can be let go, and the stop string if one is complete: then that is the end of the text.
    pub fn push(&mut self, text: &str) -> (String, Option<StopMatch>) {
        if self.patterns.is_empty() {
            return (text.to_owned(), None);
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let found = self
                .patterns
                .iter_mut()
                .filter_map(|pattern| pattern.advance(byte).then_some(&*pattern))
                .max_by_key(|pattern| (pattern.bytes.len(), std::cmp::Reverse(pattern.index)));
            if let Some(pattern) = found {
                let end = before + at + 1;
                let start = end.saturating_sub(pattern.bytes.len());
                let found = StopMatch {
                    index: pattern.index,
                };
                self.held.truncate(if self.include { end } else { start });
                return (std::mem::take(&mut self.held), Some(found));
            }
        }
        let held = self.patterns.iter().map(|pattern| pattern.matched).max();
        let free = self.held.len() - held.unwrap_or_default().min(self.held.len());
        let rest = self.held.split_off(free);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What is held back, when the text ends without a stop string.
    pub fn finish(self) -> String {
        self.held
    }
}

impl Pattern {
    fn new(index: usize, string: &str) -> Self {
        let bytes = string.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len()];
        let mut border = 0;
        for i in 1..bytes.len() {
            while border > 0 && bytes[i] != bytes[border] {
                border = fallback[border - 1];
            }
            if bytes[i] == bytes[border] {
                border += 1;
            }
            fallback[i] = border;
        }
        Self {
            index,
            bytes,
            fallback,
            matched: 0,
        }
    }

    /// Whether the pattern ends at `byte`. It is not used after that.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes.get(self.matched) != Some(&byte) {
            self.matched = self.fallback[self.matched - 1];
        }
        if self.bytes.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The first byte at which a stop string is complete; of several the longest, then the first given.
    fn naive(text: &str, strings: &[String], include: bool) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let found = strings
                .iter()
                .enumerate()
                .filter(|(_, string)| {
                    !string.is_empty() && text.as_bytes()[..end].ends_with(string.as_bytes())
                })
                .max_by_key(|(index, string)| (string.len(), std::cmp::Reverse(*index)));
            if let Some((index, string)) = found {
                let cut = if include { end } else { end - string.len() };
                return (text[..cut].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn push_in_pieces_equals_a_search_of_the_whole(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            strings in prop::collection::vec("[abé]{0,5}", 0..4),
            include: bool,
        ) {
            let whole = pieces.concat();
            let want = naive(&whole, &strings, include);
            let mut stops = StopStrings::new(&strings, include);
            let mut text = String::new();
            let mut found = None;
            for piece in &pieces {
                let (free, stop) = stops.push(piece);
                text.push_str(&free);
                // Nothing that a stop will cut is ever let go.
                prop_assert!(want.0.starts_with(&text));
                if let Some(stop) = stop {
                    found = Some(stop.index);
                    break;
                }
                // Nothing is held back without need.
                let shown = text.len();
                let seen = shown + stops.held.len();
                prop_assert!(
                    shown == seen || strings.iter().any(|string| string.starts_with(&whole[shown..seen]))
                );
            }
            if found.is_none() {
                text.push_str(&stops.finish());
            }
            prop_assert_eq!((text, found), want);
        }
    }

    #[test]
    fn push_lets_a_false_start_go() {
        let mut stops = StopStrings::new(&["</answer>".to_owned()], false);
        assert_eq!(stops.push("a </ans"), ("a ".to_owned(), None));
        assert_eq!(stops.push("</answ"), ("</ans".to_owned(), None));
        assert_eq!(
            stops.push("er> b"),
            (String::new(), Some(StopMatch { index: 0 }))
        );
    }
}
