//! A moment, as the clock's registers show it.

/// A moment in UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
    /// 1 is Sunday.
    pub weekday: u8,
    pub day: u8,
    pub month: u8,
    /// Of the century.
    pub year: u8,
    pub century: u8,
}

impl Moment {
    /// The moment `seconds` after the beginning of 1970, up to the year 9999.
    pub fn from_unix(seconds: u64) -> Self {
        let seconds = seconds.min(253_402_300_799);
        let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
        let mut year = 1970;
        let mut day = days;
        while day >= days_of_year(year) {
            day -= days_of_year(year);
            year += 1;
        }
        let mut month = 1;
        while day >= days_of_month(year, month) {
            day -= days_of_month(year, month);
            month += 1;
        }
        // Each is far below 256.
        let byte = |value: u64| u8::try_from(value).unwrap_or(0);
        Self {
            second: byte(second_of_day % 60),
            minute: byte(second_of_day / 60 % 60),
            hour: byte(second_of_day / 3600),
            // The first day of 1970 was a Thursday.
            weekday: byte((days + 4) % 7 + 1),
            day: byte(day + 1),
            month: byte(month),
            year: byte(year % 100),
            century: byte(year / 100),
        }
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}
