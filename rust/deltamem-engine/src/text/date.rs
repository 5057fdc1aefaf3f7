//! The date and time for chat templates (`strftime_now`), in UTC: what a bundle renders must not depend on a machine's time zone files.
//! Knows the proleptic Gregorian calendar and the directives that templates use.

use std::time::{SystemTime, UNIX_EPOCH};

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
const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// The present time in Python's strftime notation.
pub(super) fn strftime_now(format: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    strftime(format, now)
}

/// `seconds` since 1970 in Python's strftime notation. Unknown directives stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, day_of_year) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let name = |names: &[&'static str], index: u64| {
        usize::try_from(index)
            .ok()
            .and_then(|i| names.get(i).copied())
            .unwrap_or("")
    };
    let (month_name, weekday) = (name(&MONTHS, month - 1), name(&WEEKDAYS, (days + 4) % 7));
    let hour12 = (hour + 11) % 12 + 1;

    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let part = match characters.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name.chars().take(3).collect(),
            Some('d') => format!("{day:02}"),
            Some('j') => format!("{day_of_year:03}"),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday.chars().take(3).collect(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{hour12:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') | None => "%".to_owned(),
            Some(other) => format!("%{other}"),
        };
        text.push_str(&part);
    }
    text
}

/// (year, month from 1, day from 1, day of the year from 1) of a day since 1970.
fn civil(mut days: u64) -> (u64, u64, u64, u64) {
    // 400 years have 146,097 days.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "Thursday 001 1970-01-01 00:00:00"),
            (951_782_400, "Tuesday 060 2000-02-29 00:00:00"),
            (1_709_208_059, "Thursday 060 2024-02-29 12:00:59"),
            (1_735_689_599, "Tuesday 366 2024-12-31 23:59:59"),
            (4_107_542_400, "Monday 060 2100-03-01 00:00:00"),
            (16_725_225_600, "Friday 001 2500-01-01 00:00:00"),
        ] {
            let format = "%A %j %Y-%m-%d %H:%M:%S";
            assert_eq!(strftime(format, seconds), date);
        }
    }

    #[test]
    fn directives_are_those_of_python() {
        assert_eq!(
            strftime("%d %b %y, %I:%M %p %%", 1_709_208_059),
            "29 Feb 24, 12:00 PM %"
        );
        assert_eq!(strftime("%d %B %Y %a", 1_709_208_059), "29 February 2024 Thu");
        assert_eq!(strftime("%F %T %Z%z", 0), "1970-01-01 00:00:00 UTC+0000");
        assert_eq!(strftime("%Q 100%", 0), "%Q 100%");
    }
}
