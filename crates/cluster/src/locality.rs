//! Where a node is, and which nodes a statement wants.
//!
//! The rules are CockroachDB's (`Locality.Set` and `Locality.Matches`): one parser for the flag and for the option.

use std::fmt;
use std::str::FromStr;

/// One `key=value` pair of a locality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// What kind of place: `region`, `zone`.
    pub key: String,
    /// Which one: `us-west-1`.
    pub value: String,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

/// A piece of a locality text that is not one key and one value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tier must be in the form \"key=value\" not {0:?}")]
pub struct LocalityError(String);

/// A node's tiers, from the most to the least inclusive.
///
/// Nothing is trimmed, quoted or folded: `region=a, zone=b` has a tier whose key is `" zone"`. A key may stand twice;
/// look-ups find the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality(Vec<Tier>);

/// The tiers that a node must have to take part; the empty filter asks for nothing.
pub type Filter = Locality;

impl Locality {
    /// The tiers in their order.
    pub fn tiers(&self) -> &[Tier] {
        &self.0
    }

    /// Whether it has no tier at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first tier of `filter` that a node at this place lacks; `None` when the node matches.
    ///
    /// Every tier of the filter must be present with the same value. The order of tiers does not matter and further
    /// tiers of the node do not count.
    pub fn first_unmatched<'f>(&self, filter: &'f Filter) -> Option<&'f Tier> {
        let value = |key: &str| self.0.iter().find(|tier| tier.key == key).map(|tier| tier.value.as_str());
        filter.0.iter().find(|tier| value(&tier.key) != Some(tier.value.as_str()))
    }

    /// How many leading tiers, key and value, two places share.
    pub fn shared_prefix(&self, other: &Self) -> usize {
        self.0.iter().zip(&other.0).take_while(|(a, b)| a == b).count()
    }
}

impl FromStr for Locality {
    type Err = LocalityError;

    fn from_str(text: &str) -> Result<Self, LocalityError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        text.split(',')
            .map(|piece| match piece.split('=').collect::<Vec<_>>().as_slice() {
                [key, value] if !key.is_empty() && !value.is_empty() => {
                    Ok(Tier { key: (*key).to_owned(), value: (*value).to_owned() })
                }
                _ => Err(LocalityError(piece.to_owned())),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tiers: Vec<String> = self.0.iter().map(Tier::to_string).collect();
        f.write_str(&tiers.join(","))
    }
}

impl serde::Serialize for Locality {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Locality {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Locality {
        text.parse().expect("a locality")
    }

    #[test]
    fn a_locality_prints_as_it_was_written() {
        for text in ["", "region=a", "region=us-west-1,zone=b", "region=a, zone=b", "a=x,a=y"] {
            assert_eq!(at(text).to_string(), text);
        }
    }

    #[test]
    fn a_piece_that_is_no_tier_is_named() {
        for (text, piece) in [
            ("abc", "abc"),
            ("a=b,", ""),
            ("a=b,,c=d", ""),
            ("=b", "=b"),
            ("a=", "a="),
            ("=", "="),
            ("a=b=c", "a=b=c"),
            // As Go's %q prints it.
            ("it's", "it's"),
            ("a\"b", "a\\\"b"),
            ("a\tb", "a\\tb"),
        ] {
            let message = text.parse::<Locality>().expect_err(text).to_string();
            assert_eq!(message, format!("tier must be in the form \"key=value\" not \"{piece}\""));
        }
    }

    #[test]
    fn every_tier_of_the_filter_must_be_there() {
        for (node, filter, lacking) in [
            ("region=x,az=a", "", None),
            ("region=x,az=a", "az=a", None),
            ("region=x,az=a", "az=a,region=x", None),
            ("region=x,az=a", "region=X", Some("region=X")),
            ("region=x", "region=x,az=a", Some("az=a")),
            ("region=x", "region=x,region=y", Some("region=y")),
            ("a=x,a=y", "a=y", Some("a=y")),
            ("", "region=x", Some("region=x")),
        ] {
            let filter = at(filter);
            let found = at(node).first_unmatched(&filter).map(Tier::to_string);
            assert_eq!(found.as_deref(), lacking, "{node} against {filter}");
        }
    }

    #[test]
    fn likeness_counts_leading_tiers_only() {
        for (a, b, shared) in [
            ("cloud=x,region=a", "cloud=x,region=a", 2),
            ("cloud=x,region=a", "cloud=x,region=b", 1),
            ("cloud=x,region=a", "region=a,cloud=x", 0),
            ("", "region=a", 0),
        ] {
            assert_eq!(at(a).shared_prefix(&at(b)), shared, "{a} and {b}");
        }
    }
}
