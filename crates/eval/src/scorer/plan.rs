//! Which tokens go through the model together, and which are computed once for several requests.

use std::collections::HashMap;

/// Shared tokens below which sharing costs more than it saves.
const LEAST_SHARED: usize = 8;

/// The model's input for one or several requests, whose targets follow its last tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) ids: Vec<u32>,
    /// Requests with what should follow the last `targets.len()` tokens.
    pub(super) wanted: Vec<(usize, Vec<u32>)>,
}

impl Row {
    /// The first place whose logits are looked at.
    fn first_scored(&self) -> usize {
        self.ids.len() - self.wanted.iter().map(|(_, targets)| targets.len()).max().unwrap_or(0)
    }
}

/// Rows that begin with the same tokens, which are computed once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) rows: Vec<Row>,
    /// How many; 0 of a single row.
    pub(super) shared: usize,
}

impl Unit {
    fn longest(&self) -> usize {
        self.rows.iter().map(|row| row.ids.len()).max().unwrap_or(0)
    }
}

/// The input and its targets, cut from the left to what fits.
pub(super) fn row(request: usize, context: Vec<u32>, continuation: Vec<u32>, max_length: usize) -> Row {
    let mut ids = context;
    ids.extend_from_slice(&continuation);
    ids.pop();
    let cut = ids.len().saturating_sub(max_length);
    ids.drain(..cut);
    Row { ids, wanted: vec![(request, continuation)] }
}

/// Puts equal inputs together, then neighbours that share a beginning; longest first. Rows longer than `cache_limit` don't
/// share.
pub(super) fn units(rows: Vec<Row>, cache_limit: Option<usize>) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let shares = |row: &Row| cache_limit.is_none_or(|limit| row.ids.len() <= limit);
    for row in merged(rows) {
        let last = units.last().filter(|unit| shares(&row) && unit.rows.iter().all(shares));
        let joined = last.and_then(|unit| shared_with(unit, &row));
        match (joined, units.last_mut()) {
            (Some(shared), Some(unit)) => {
                unit.rows.push(row);
                unit.shared = shared;
            }
            _ => units.push(Unit { rows: vec![row], shared: 0 }),
        }
    }
    units.sort_by_key(|unit| std::cmp::Reverse(unit.longest()));
    units
}

/// Requests with the same input need it once: single-token choices of one question.
fn merged(rows: Vec<Row>) -> Vec<Row> {
    let mut places: HashMap<Vec<u32>, usize> = HashMap::new();
    let mut result: Vec<Row> = Vec::new();
    for mut row in rows {
        match places.get(&row.ids) {
            Some(&place) => result[place].wanted.append(&mut row.wanted),
            None => {
                places.insert(row.ids.clone(), result.len());
                result.push(row);
            }
        }
    }
    result
}

/// Tokens that `unit` and `row` would share, if that saves no less than the unit saves without it.
fn shared_with(unit: &Unit, row: &Row) -> Option<usize> {
    let first = &unit.rows[0];
    let limit = if unit.rows.len() == 1 { first.first_scored() } else { unit.shared };
    let limit = limit.min(row.first_scored());
    let common = first.ids.iter().zip(&row.ids).take(limit).take_while(|(a, b)| a == b).count();
    let saved = unit.shared * (unit.rows.len() - 1);
    (common >= LEAST_SHARED && common * unit.rows.len() >= saved).then_some(common)
}

/// Units for one forward pass: up to `batch` rows, of units that all share or all don't; at least one unit.
pub(super) fn batches(units: Vec<Unit>, batch: usize) -> Vec<Vec<Unit>> {
    let (shared, single): (Vec<Unit>, Vec<Unit>) = units.into_iter().partition(|unit| unit.shared > 0);
    let mut result = Vec::new();
    for units in [shared, single] {
        let mut rows = 0;
        let mut current: Vec<Unit> = Vec::new();
        for unit in units {
            if !current.is_empty() && rows + unit.rows.len() > batch {
                result.push(std::mem::take(&mut current));
                rows = 0;
            }
            rows += unit.rows.len();
            current.push(unit);
        }
        if !current.is_empty() {
            result.push(current);
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
        range.collect()
    }

    #[test]
    fn inputs_are_cut_from_the_left_and_lose_the_last_token() {
        let cut = row(3, vec![1, 2, 3, 4], vec![5, 6], 4);
        assert_eq!(cut, Row { ids: vec![2, 3, 4, 5], wanted: vec![(3, vec![5, 6])] });
        assert_eq!(cut.first_scored(), 2);
        assert_eq!(row(0, vec![1], vec![5, 6, 7], 3).ids, [1, 5, 6]);
    }

    #[test]
    fn choices_share_their_question() {
        let question = tokens(0..20);
        let rows = vec![
            row(0, question.clone(), vec![50], 99),
            row(1, question.clone(), vec![51], 99),
            row(2, question.clone(), vec![52, 53, 54], 99),
            row(3, tokens(100..130), vec![50], 99),
        ];
        let units = units(rows, None);
        assert_eq!(units.len(), 2);
        // The other question, longer, on its own.
        assert_eq!((units[0].rows.len(), units[0].shared), (1, 0));
        let unit = &units[1];
        // Two single tokens in one row; the last token of the question is needed for its logits.
        assert_eq!((unit.rows.len(), unit.shared), (2, 19));
        assert_eq!(unit.rows[0].wanted, [(0, vec![50]), (1, vec![51])]);
    }

    #[test]
    fn a_long_common_beginning_is_shared_by_many_questions() {
        let rows = (0..5).map(|n| {
            let mut context = tokens(0..40);
            context.extend(100 * (n + 1)..100 * (n + 1) + 6);
            row(n as usize, context, vec![7], 99)
        });
        let units = units(rows.collect(), None);
        assert_eq!((units.len(), units[0].rows.len(), units[0].shared), (1, 5, 40));
        // Less than that isn't worth it.
        let rows = (0..2).map(|n| row(n, vec![1, 2, 3, n as u32 + 10], vec![7], 99)).collect();
        assert_eq!(super::units(rows, None).len(), 2);
        // Nor is it allowed where one of the rows is beyond what a cache serves for.
        let questions = || {
            let rows = (0..2).map(|n| {
                let mut context = tokens(0..40);
                context.extend(100 * (n + 1)..100 * (n + 1) + 6 * (n + 1));
                row(n as usize, context, vec![7], 99)
            });
            rows.collect::<Vec<_>>()
        };
        let longest = questions().iter().map(|row| row.ids.len()).max().unwrap();
        let shared = |limit| super::units(questions(), Some(limit)).iter().any(|unit| unit.shared > 0);
        assert!(shared(longest) && !shared(longest - 1));
    }

    #[test]
    fn choices_are_not_torn_from_their_question_for_a_short_common_beginning() {
        let choice = |request, question: u32, choice: u32| {
            let mut context = tokens(0..10);
            context.extend(100 * question..100 * question + 50);
            row(request, context, vec![choice, choice], 99)
        };
        let rows = vec![choice(0, 1, 5), choice(1, 1, 6), choice(2, 1, 7), choice(3, 2, 5), choice(4, 2, 6)];
        let found = units(rows, None);
        // All of the question but its last token, whose logits the choices need.
        assert_eq!(
            found.iter().map(|unit| (unit.rows.len(), unit.shared)).collect::<Vec<_>>(),
            [(3, 59), (2, 59)]
        );
    }

    #[test]
    fn batches_hold_whole_units() {
        let unit = |rows: usize, shared| Unit { rows: vec![row(0, vec![1, 2], vec![3], 9); rows], shared };
        let units = vec![unit(4, 1), unit(1, 0), unit(4, 1), unit(1, 0), unit(9, 1), unit(1, 0)];
        let sizes = |batch| -> Vec<Vec<usize>> {
            let found = batches(units.clone(), batch);
            found.iter().map(|units| units.iter().map(|unit| unit.rows.len()).collect()).collect()
        };
        assert_eq!(sizes(8), [vec![4, 4], vec![9], vec![1, 1, 1]]);
        assert_eq!(sizes(2), [vec![4], vec![4], vec![9], vec![1, 1], vec![1]]);
        assert_eq!(sizes(1).len(), 6);
    }
}
