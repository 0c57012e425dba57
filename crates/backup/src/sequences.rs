//! A sequence has two values in a backup of a primary: that of the point, and that of the end.
//!
//! Sequences are no part of a snapshot. What rows of the point use may have been given out just after it, and somebody
//! may have set a sequence back meanwhile; what is kept is never behind either.

use fleet::founders::SequencePlan;

/// Replaces each value by that of `later`, where that is further along in the sequence's own direction. One that is gone
/// later keeps its value, and one that is new is no part of the point.
pub(crate) fn merge(sequences: &mut [SequencePlan], later: &[SequencePlan]) {
    for sequence in sequences {
        let same = |other: &&SequencePlan| (&other.schema, &other.name) == (&sequence.schema, &sequence.name);
        if let Some(other) = later.iter().find(same).filter(|other| is_ahead(sequence, other)) {
            *sequence = other.clone();
        }
    }
}

fn is_ahead(one: &SequencePlan, other: &SequencePlan) -> bool {
    if one.last_value == other.last_value {
        return other.is_called;
    }
    (other.last_value < one.last_value) == (one.increment < 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(name: &str, last_value: i64, is_called: bool, increment: i64) -> SequencePlan {
        SequencePlan { schema: "public".to_owned(), name: name.to_owned(), last_value, is_called, increment }
    }

    #[test]
    fn the_value_that_is_further_along_is_kept() {
        for (increment, point, end, kept) in [
            (1, (5, true), (9, true), (9, true)),
            (1, (9, true), (5, true), (9, true)),
            (-5, (-1, true), (-11, true), (-11, true)),
            (-5, (-11, true), (-1, true), (-11, true)),
            // The first value, and then given out; never the other way.
            (1, (1, false), (1, true), (1, true)),
            (1, (1, true), (1, false), (1, true)),
            (-1, (-1, false), (-1, true), (-1, true)),
            (1, (1, false), (1, false), (1, false)),
            (1, (i64::MIN, true), (i64::MAX, true), (i64::MAX, true)),
        ] {
            let mut sequences = [sequence("s", point.0, point.1, increment)];
            merge(&mut sequences, &[sequence("s", end.0, end.1, increment)]);
            let [now] = sequences;
            assert_eq!((now.last_value, now.is_called), kept, "{increment}: {point:?} {end:?}");
        }
    }

    #[test]
    fn only_the_sequence_of_the_same_name_counts() {
        let mut sequences = [sequence("a", 1, true, 1), sequence("gone", 7, true, 1)];
        let other_schema = SequencePlan { schema: "other".to_owned(), ..sequence("a", 50, true, 1) };
        merge(&mut sequences, &[other_schema, sequence("new", 9, true, 1), sequence("a", 3, true, 1)]);
        assert_eq!(sequences, [sequence("a", 3, true, 1), sequence("gone", 7, true, 1)]);
    }
}
