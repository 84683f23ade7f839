//! Numbers of tables.

/// A number with at most `digits` significant digits, with an exponent where it has more places before the point.
pub(crate) fn significant(value: f64, digits: usize) -> String {
    let scientific = format!("{value:.*e}", digits - 1);
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text.to_string(),
    };
    match exponent < -4 || exponent >= digits as i32 {
        true => format!("{}e{exponent}", trim(mantissa)),
        false => trim(&format!("{value:.*}", (digits as i32 - 1 - exponent).max(0) as usize)),
    }
}

pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation of a sample; none of fewer than two values.
pub(crate) fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_the_tables_have_them() {
        for (value, digits, expected) in [
            (477_568.6, 4, "4.776e5"),
            (63_256.1, 4, "6.326e4"),
            (1417.2, 4, "1417"),
            (162.0, 4, "162"),
            (44.0, 4, "44"),
            (97.388, 4, "97.39"),
            (0.93, 3, "0.93"),
            (0.000012, 3, "1.2e-5"),
        ] {
            assert_eq!(significant(value, digits), expected);
        }
    }

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(deviation(&[1.0, 3.0]), Some(2f64.sqrt()));
        assert_eq!(deviation(&[1.0]), None);
    }
}
