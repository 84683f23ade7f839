//! The result: plans that no other measured plan beats in both memory and score.

use std::{fmt::Write as _, fs, io::Write as _, path::Path};

use serde::{Deserialize, Serialize};

use crate::{Config, Direction, Error, Fidelity, Plan, Result, SearchSpace, Trial, pareto_front};

/// A plan on the front.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FrontPoint {
    /// Bytes on the searched memory axis.
    pub bytes: u64,
    /// The score, as the objective gave it.
    pub score: f64,
    /// The plan as indices.
    pub config: Config,
    /// The plan as settings.
    pub plan: Plan,
}

/// The Pareto front of memory and score, smallest plan first. Its JSON is this struct's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Front {
    /// Which way scores are better.
    pub direction: Direction,
    /// Bytes of the smallest plan of the space, measured or not.
    pub smallest: u64,
    /// The plans.
    pub points: Vec<FrontPoint>,
}

impl Front {
    /// The front of all trials of one fidelity and seed, for instance those of several searches in one log. Trials
    /// that failed, were stopped early or exceed `max_bytes` don't count.
    pub fn of_trials<'t>(
        space: &SearchSpace,
        direction: Direction,
        trials: impl IntoIterator<Item = &'t Trial>,
        fidelity: Fidelity,
        seed: u64,
        max_bytes: Option<u64>,
    ) -> Self {
        let counts = |trial: &&Trial| {
            let inside = max_bytes.is_none_or(|limit| trial.bytes <= limit);
            trial.fidelity == fidelity && trial.seed == seed && !trial.stopped && inside
        };
        let mut measured: Vec<(&Config, u64, f64)> = trials
            .into_iter()
            .filter(counts)
            .filter_map(|trial| Some((&trial.config, trial.bytes, trial.score?)))
            .collect();
        // The order of a shared log is anybody's; that of the front is not.
        measured.sort_by(|a, b| (a.1, a.0).cmp(&(b.1, b.0)));
        let points: Vec<[f64; 2]> =
            measured.iter().map(|(_, bytes, score)| [*bytes as f64, direction.loss(*score)]).collect();
        let mut front: Vec<FrontPoint> = pareto_front(&points)
            .into_iter()
            .map(|index| {
                let (config, bytes, score) = measured[index];
                FrontPoint { bytes, score, config: config.clone(), plan: space.plan(config) }
            })
            .collect();
        // Of several plans with the same figures one is enough.
        front.dedup_by(|b, a| a.bytes == b.bytes && a.score == b.score);
        Self { direction, smallest: space.smallest(), points: front }
    }

    /// The best plan of at most `max_bytes`.
    ///
    /// # Errors
    /// [`Error::Limit`] if no plan of the space is that small, [`Error::NotMeasured`] if no measured one is.
    pub fn select(&self, max_bytes: u64) -> Result<&FrontPoint> {
        // Along the front the score improves with the bytes.
        self.points.iter().rev().find(|point| point.bytes <= max_bytes).ok_or_else(|| {
            if max_bytes < self.smallest {
                Error::Limit { limit: max_bytes, smallest: self.smallest }
            } else {
                let measured = self.points.first().map(|point| point.bytes);
                Error::NotMeasured { limit: max_bytes, measured, smallest: self.smallest }
            }
        })
    }

    /// Bytes and losses, for [`hypervolume`](crate::hypervolume).
    pub fn losses(&self) -> Vec<[f64; 2]> {
        self.points.iter().map(|point| [point.bytes as f64, self.direction.loss(point.score)]).collect()
    }

    /// A Markdown table: bytes, score, and how many projections get which setting.
    pub fn to_markdown(&self) -> String {
        let mut table = String::from("| bytes | score | projections |\n| ---: | ---: | --- |\n");
        for FrontPoint { bytes, score, plan, .. } in &self.points {
            let mut counts: Vec<(String, usize)> = Vec::new();
            for (_, setting) in plan.iter() {
                let name = setting.to_string();
                match counts.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((name, 1)),
                }
            }
            counts.sort();
            let counts: Vec<String> =
                counts.iter().map(|(name, count)| format!("{count} × `{name}`")).collect();
            // Writing to a string can't fail.
            let _ = writeln!(table, "| {bytes} | {score:.6} | {} |", counts.join(", "));
        }
        table
    }

    /// Writes `front.json`, `front.md` and `front.svg` into a folder, each whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Plot`].
    pub fn save(&self, folder: impl AsRef<Path>, trials: &[Trial]) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::io(folder)(e.into()))?;
        let svg = self.to_svg(trials)?;
        for (name, text) in [("front.json", json), ("front.md", self.to_markdown()), ("front.svg", svg)] {
            let path = folder.join(name);
            let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(&path))?;
            file.write_all(text.as_bytes()).map_err(Error::io(&path))?;
            file.as_file().sync_all().map_err(Error::io(&path))?;
            file.persist(&path).map_err(|e| Error::io(&path)(e.error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toy_space;

    fn trials(space: &SearchSpace, scores: &[(&[u8], f64)]) -> Vec<Trial> {
        let trial = |(config, score): &(&[u8], f64)| {
            let config = Config(config.to_vec());
            Trial {
                fidelity: Fidelity::kl(10),
                seed: 1,
                score: Some(*score).filter(|score| score.is_finite()),
                bytes: space.bytes(&config),
                seconds: 0.0,
                method: "random".into(),
                figures: Default::default(),
                curve: vec![],
                stopped: false,
                plan: space.plan(&config),
                config,
            }
        };
        scores.iter().map(trial).collect()
    }

    #[test]
    fn front_selection_json_and_table() {
        let space = toy_space(2, 3);
        // Bytes 143 + 20 a + 23 b.
        let all = trials(
            &space,
            &[
                (&[0, 1], 0.5),
                (&[1, 1], 0.6),
                (&[2, 2], 0.9),
                (&[1, 0], 0.4),
                (&[2, 0], f64::NAN),
                (&[2, 1], 0.6),
            ],
        );
        let front = |max| Front::of_trials(&space, Direction::Maximize, &all, Fidelity::kl(10), 1, max);
        let whole = front(None);
        let found: Vec<(u64, f64)> = whole.points.iter().map(|p| (p.bytes, p.score)).collect();
        assert_eq!(found, [(163, 0.4), (166, 0.5), (186, 0.6), (229, 0.9)]);
        assert_eq!(front(Some(200)).points.len(), 3);
        assert_eq!(whole.select(200).unwrap().score, 0.6);
        assert_eq!(whole.select(229).unwrap().config, space.highest());
        let error = whole.select(142).unwrap_err().to_string();
        assert!(error.contains("smallest possible plan takes 143 bytes"), "{error}");
        let error = whole.select(150).unwrap_err().to_string();
        assert!(error.contains("163") && error.contains("143"), "{error}");
        let read: Front = serde_json::from_str(&serde_json::to_string(&whole).unwrap()).unwrap();
        assert_eq!(read, whole);
        let table = whole.to_markdown();
        assert_eq!(table.lines().count(), 6);
        assert!(table.contains("| 166 | 0.500000 | 2 × `affine2:64`, 2 × `affine3:64` |"), "{table}");

        let folder = tempfile::tempdir().unwrap();
        whole.save(folder.path(), &all).unwrap();
        let svg = std::fs::read_to_string(folder.path().join("front.svg")).unwrap();
        // One circle per finished trial, one per point of the front.
        assert_eq!(svg.matches("<circle").count(), 5 + 4);
        assert!(svg.starts_with("<svg") && svg.contains("<polyline"));
        assert!(folder.path().join("front.json").exists() && folder.path().join("front.md").exists());
    }

    #[test]
    fn an_empty_front_still_draws_and_says_what_is_possible() {
        let space = toy_space(2, 2);
        let front = Front::of_trials(&space, Direction::Minimize, [], Fidelity::kl(1), 0, None);
        assert!(front.to_svg(&[]).unwrap().contains("<svg"));
        assert!(front.select(u64::MAX).unwrap_err().to_string().contains("no plan was measured"));
    }
}
