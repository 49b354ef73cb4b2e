//! The speed of a kernel-mode loop between two port exits.

use std::time::{Duration, Instant};

use super::guest::{DATA, Guest, PORT_DONE, PORT_READY, Program, RunError};

/// Announces itself, counts down from the number at [`DATA`], announces its end, and begins again.
///
/// ```text
/// again: e6 e0        out  0xe0, al
///        48 8b 0f     mov  rcx, [rdi]
/// loop:  48 ff c9     dec  rcx
///        75 fb        jnz  loop
///        e6 e1        out  0xe1, al
///        eb f2        jmp  again
/// ```
const LOOP: Program = Program {
    code: &[0xe6, 0xe0, 0x48, 0x8b, 0x0f, 0x48, 0xff, 0xc9, 0x75, 0xfb, 0xe6, 0xe1, 0xeb, 0xf2],
    breakpoint_handler: &[],
};
/// Instructions in one turn of the loop.
const PER_TURN: u64 = 2;
/// Turns of the first round: about 12 ms where the kernel interprets them, a blink where it does not.
const FIRST_TURNS: u64 = 10_000;
/// Turns of the longest round: 10 ms at half a billion instructions a second.
const MOST_TURNS: u64 = 2_500_000;
const GROWTH: u64 = 5;
/// A round that takes as long as this says enough: the exit at its end no longer weighs.
const LONG_ENOUGH: Duration = Duration::from_millis(5);
/// Rounds at the full length; the best counts, since other work on the machine only ever takes time away.
const ROUNDS: u32 = 3;

/// Measures kernel-mode instructions per second.
pub(super) fn measure(guest: &mut Guest) -> Result<u64, RunError> {
    guest.load(&LOOP)?;
    let mut turns = FIRST_TURNS;
    let mut best = 0;
    let mut rounds = 0;
    while rounds < ROUNDS {
        let (rate, took, whole) = round(guest, turns)?;
        if !whole {
            return Ok(best.max(rate));
        }
        if took < LONG_ENOUGH && turns < MOST_TURNS {
            turns = (turns * GROWTH).min(MOST_TURNS);
        } else {
            best = best.max(rate);
            rounds += 1;
        }
    }
    Ok(best)
}

/// One round: its rate, its time, and whether it came to its end. A guest that is stopped at its deadline in the
/// middle of a round has still done a known part of it.
fn round(guest: &mut Guest, turns: u64) -> Result<(u64, Duration, bool), RunError> {
    guest.write(DATA, &turns.to_le_bytes())?;
    guest.run_to(PORT_READY)?;
    let begin = Instant::now();
    let result = guest.run_to(PORT_DONE);
    let took = begin.elapsed();
    let left = match result {
        Ok(()) => 0,
        // Zero before the count was loaded: then nothing at all was done.
        Err(RunError::Interrupted { .. }) => match guest.registers()?.rcx {
            0 => turns,
            left => left.min(turns),
        },
        Err(error) => return Err(error),
    };
    Ok((rate((turns - left) * PER_TURN, took), took, result.is_ok()))
}

/// Instructions per second.
fn rate(instructions: u64, took: Duration) -> u64 {
    let nanoseconds = took.as_nanos().max(1);
    u64::try_from(u128::from(instructions) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_instructions_per_second() {
        assert_eq!(rate(20_000, Duration::from_millis(10)), 2_000_000);
        assert_eq!(rate(5, Duration::ZERO), 5_000_000_000);
    }
}
