//! The time that templates may print.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const DAY: i64 = 86_400;

/// A point in time as a wall clock shows it: date and time of day, without a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CivilTime {
    /// Seconds that a clock would have counted from 1970-01-01 00:00:00.
    seconds: i64,
}

impl CivilTime {
    /// The wall clock in UTC, `seconds` after 1970-01-01 00:00:00. For another zone add its offset.
    ///
    /// ```
    /// use kiln_models::chat::CivilTime;
    /// assert_eq!(CivilTime::from_unix(951_827_696).format("%d %B %Y, %H:%M")?, "29 February 2000, 12:34");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn from_unix(seconds: i64) -> Self {
        Self { seconds }
    }

    /// Year, month (1..=12) and day (1..=31) of the Gregorian calendar.
    fn date(self) -> (i64, usize, i64) {
        // Years are counted from 1 March of year 0 on, so that a leap day is a year's last; 400 years have 146,097 days.
        let days = self.seconds.div_euclid(DAY) + 719_468;
        let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        // From March on, months of 31, 30, 31, 30, 31 days repeat: 153 days each five.
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        (era * 400 + year + carry, month as usize, day)
    }

    /// The time in C's `strftime` notation, English names. Known are `%a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F
    /// %T %%`, and a `-` after the percent sign that drops a leading zero.
    ///
    /// # Errors
    /// For another conversion, naming it.
    pub fn format(self, pattern: &str) -> Result<String, Error> {
        let mut text = String::new();
        let mut chars = pattern.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            let (bare, conversion) = match chars.next() {
                Some('-') => (true, chars.next()),
                conversion => (false, conversion),
            };
            let part = conversion.and_then(|conversion| self.part(conversion)).ok_or_else(|| {
                let found = conversion.map(String::from).unwrap_or_default();
                Error::new(ErrorKind::InvalidOperation, format!("strftime_now: %{found} is not supported"))
            })?;
            let digits = part.trim_start_matches(['0', ' ']);
            text.push_str(match (bare, digits) {
                (true, "") => "0",
                (true, digits) => digits,
                _ => &part,
            });
        }
        Ok(text)
    }

    fn part(self, conversion: char) -> Option<String> {
        let (year, month, day) = self.date();
        let second = self.seconds.rem_euclid(DAY);
        let (hour, minute) = (second / 3_600, second / 60 % 60);
        let weekday = DAYS[(self.seconds.div_euclid(DAY) + 4).rem_euclid(7) as usize];
        Some(match conversion {
            'A' => weekday.into(),
            'a' => weekday[..3].into(),
            'B' => MONTHS[month - 1].into(),
            'b' => MONTHS[month - 1][..3].into(),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'j' => format!("{:03}", day_of_year(year, month, day)),
            'm' => format!("{month:02}"),
            'M' => format!("{minute:02}"),
            'p' => if hour < 12 { "AM" } else { "PM" }.into(),
            'S' => format!("{:02}", second % 60),
            'T' => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            'y' => format!("{:02}", year.rem_euclid(100)),
            'Y' => year.to_string(),
            '%' => "%".into(),
            _ => return None,
        })
    }
}

fn day_of_year(year: i64, month: usize, day: i64) -> i64 {
    const BEFORE: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    BEFORE[month - 1] + day + i64::from(leap && month > 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected texts are GNU date's: `date -u -d @SECONDS +FORMAT`.
    #[test]
    fn times_read_as_gnu_date_prints_them() {
        let format = "%a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F %T %-d %-H %%";
        for (seconds, expected) in CASES {
            assert_eq!(CivilTime::from_unix(seconds).format(format).unwrap(), expected);
        }
        assert!(CivilTime::from_unix(0).format("%Q").unwrap_err().to_string().contains("%Q"));
        assert!(CivilTime::from_unix(0).format("100%").is_err());
    }

    const CASES: [(i64, &str); 5] = [
        (0, "Thu Thursday Jan January 01  1 00 12 001 01 00 AM 00 70 1970 1970-01-01 00:00:00 1 0 %"),
        (
            951827696,
            "Tue Tuesday Feb February 29 29 12 12 060 02 34 PM 56 00 2000 2000-02-29 12:34:56 29 12 %",
        ),
        (-1, "Wed Wednesday Dec December 31 31 23 11 365 12 59 PM 59 69 1969 1969-12-31 23:59:59 31 23 %"),
        (
            1709251199,
            "Thu Thursday Feb February 29 29 23 11 060 02 59 PM 59 24 2024 2024-02-29 23:59:59 29 23 %",
        ),
        (4107542400, "Mon Monday Mar March 01  1 00 12 060 03 00 AM 00 00 2100 2100-03-01 00:00:00 1 0 %"),
    ];
}
