//! Names of blocks: a chained hash over all that the K and V in a block depend on. Equal names mean equal contents.
//!
//! With routed experts the hidden states depend on the gates, so a chain starts from the weights, the variant and its
//! rules, and from a salt that keeps tenants apart. Every field has a fixed size or its length in front, and the two kinds of
//! link have different first bytes: no two inputs meet in one message.

use sha2::{Digest, Sha256};

use crate::types::{BLOCK_TOKENS, GateOverride, GateRule, TokenId, Variant};

const ROOT_DOMAIN: &[u8] = b"midpo.prefix.root.1\0";
const BLOCK_DOMAIN: &[u8] = b"midpo.prefix.block.1\0";

/// Name of a block's contents and of all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

/// Who may find a request's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing<'a> {
    /// All requests without a salt.
    Everyone,
    /// Requests with this salt.
    Salt(&'a str),
    /// The request with this number alone.
    Request(u64),
}

/// What a chain of blocks depends on beside its tokens.
#[derive(Clone, Copy, Debug)]
pub struct PrefixRoot<'a> {
    /// Identity of the weights.
    pub fingerprint: &'a str,
    /// The variant's word.
    pub variant: Variant,
    /// Its rules after biases, floors and ceilings; to the bit.
    pub gates: GateOverride,
    /// Who may find the blocks.
    pub sharing: Sharing<'a>,
}

impl PrefixRoot<'_> {
    /// The name that the first block's follows.
    pub fn hash(&self) -> BlockHash {
        let mut hasher = Sha256::new();
        hasher.update(ROOT_DOMAIN);
        update_text(&mut hasher, self.fingerprint);
        update_text(&mut hasher, self.variant.as_str());
        for rule in [self.gates.safety, self.gates.helpfulness] {
            update_rule(&mut hasher, rule);
        }
        match self.sharing {
            Sharing::Everyone => hasher.update([0]),
            Sharing::Salt(salt) => {
                hasher.update([1]);
                update_text(&mut hasher, salt);
            }
            Sharing::Request(number) => {
                hasher.update([2]);
                hasher.update(number.to_le_bytes());
            }
        }
        BlockHash(hasher.finalize().into())
    }
}

impl BlockHash {
    /// The name of the block that holds `tokens` and follows the block named `self`.
    pub fn next(&self, tokens: &[TokenId; BLOCK_TOKENS]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(BLOCK_DOMAIN);
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.0.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }
}

fn update_text(hasher: &mut Sha256, text: &str) {
    hasher.update((text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

fn update_rule(hasher: &mut Sha256, rule: GateRule) {
    for number in [rule.bias(), rule.floor(), rule.ceiling()] {
        hasher.update(number.to_bits().to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn root() -> PrefixRoot<'static> {
        PrefixRoot {
            fingerprint: "f",
            variant: Variant::Routed,
            gates: Variant::Routed.gates(),
            sharing: Sharing::Everyone,
        }
    }

    fn with_safety(rule: GateRule) -> PrefixRoot<'static> {
        let mut root = root();
        root.gates.safety = rule;
        root
    }

    #[test]
    fn roots_that_differ_in_anything_have_different_hashes() {
        let others = [
            PrefixRoot {
                fingerprint: "g",
                ..root()
            },
            PrefixRoot {
                variant: Variant::Base,
                ..root()
            },
            PrefixRoot {
                gates: Variant::Base.gates(),
                ..root()
            },
            with_safety(GateRule::new(0.1, 0.0, 1.0).unwrap()),
            with_safety(GateRule::new(0.0, 0.1, 1.0).unwrap()),
            with_safety(GateRule::new(0.0, 0.0, 0.9).unwrap()),
            with_safety(GateRule::new(f32::MIN_POSITIVE, 0.0, 1.0).unwrap()),
            PrefixRoot {
                gates: GateOverride {
                    helpfulness: GateRule::new(0.1, 0.0, 1.0).unwrap(),
                    ..root().gates
                },
                ..root()
            },
            PrefixRoot {
                sharing: Sharing::Salt(""),
                ..root()
            },
            PrefixRoot {
                sharing: Sharing::Salt("a"),
                ..root()
            },
            PrefixRoot {
                sharing: Sharing::Salt("b"),
                ..root()
            },
            PrefixRoot {
                sharing: Sharing::Request(0),
                ..root()
            },
            PrefixRoot {
                sharing: Sharing::Request(1),
                ..root()
            },
        ];
        let mut hashes: Vec<BlockHash> = others.iter().map(PrefixRoot::hash).collect();
        hashes.push(root().hash());
        let distinct: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }

    #[test]
    fn a_zero_bias_has_one_hash_whatever_its_sign() {
        let negative = with_safety(GateRule::new(-0.0, -0.0, 1.0).unwrap());
        assert_eq!(negative.hash(), root().hash());
    }

    #[test]
    fn blocks_depend_on_every_token_and_on_all_before() {
        let tokens = [TokenId(1); BLOCK_TOKENS];
        let first = root().hash().next(&tokens);
        assert_eq!(first, root().hash().next(&tokens));
        assert_ne!(first.next(&tokens), first);
        for at in 0..BLOCK_TOKENS {
            let mut other = tokens;
            other[at] = TokenId(2);
            assert_ne!(root().hash().next(&other), first);
            assert_ne!(
                root().hash().next(&other).next(&tokens),
                first.next(&tokens)
            );
        }
    }
}
