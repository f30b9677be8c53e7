//! The grammar that templates need: articles, persons, capitals.

/// `a` or `an`, by how the next word begins.
pub(super) fn fix_articles(text: &str) -> String {
    let words: Vec<&str> = text.split(' ').collect();
    let mut fixed = Vec::with_capacity(words.len());
    for (at, word) in words.iter().enumerate() {
        let next = words.get(at + 1);
        fixed.push(match (*word, next) {
            ("a" | "an", Some(next)) if sounds_like_a_vowel(next) => "an",
            ("a" | "an", Some(_)) => "a",
            (word, _) => word,
        });
    }
    fixed.join(" ")
}

/// For the words of our lists: none of them begins with a silent h or a u as in "use".
fn sounds_like_a_vowel(word: &str) -> bool {
    word.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U'])
}

/// What the user says about themselves, said to them: "my own bike" becomes "your own bike".
pub(super) fn said_to_user(text: &str) -> String {
    let swap = |word| match word {
        "my" => "your",
        "me" => "you",
        "myself" => "yourself",
        other => other,
    };
    text.split(' ').map(swap).collect::<Vec<_>>().join(" ")
}

/// With a small first letter, as after a comma; "I" and names stay.
pub(super) fn continued(sentence: &str) -> String {
    let first_word = sentence.split([' ', '\'']).next().unwrap_or_default();
    let mut letters = sentence.chars();
    match letters.next() {
        Some(first) if first_word != "I" => first.to_lowercase().chain(letters).collect(),
        _ => sentence.to_owned(),
    }
}

/// With a capital first letter.
pub(super) fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_uppercase().chain(letters).collect())
        .unwrap_or_default()
}

/// The words of `text` in small letters: letters, digits and apostrophes.
pub(in crate::demo) fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '\''))
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
}

/// FNV-1a.
pub(super) fn hash(text: &str) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    text.bytes().fold(OFFSET, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_persons_and_capitals_are_english() {
        assert_eq!(fix_articles("a old egg in a oven"), "an old egg in an oven");
        assert_eq!(fix_articles("an big egg"), "a big egg");
        assert_eq!(
            said_to_user("fix my bike by myself for me"),
            "fix your bike by yourself for you"
        );
        assert_eq!(continued("How do I?"), "how do I?");
        assert_eq!(continued("I want to."), "I want to.");
        assert_eq!(capitalized("a spider"), "A spider");
        let found: Vec<String> = words("Sure, I can't: twenty-four!").collect();
        assert_eq!(found, ["sure", "i", "can't", "twenty", "four"]);
    }

    #[test]
    fn hash_is_the_published_function() {
        assert_eq!(hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
