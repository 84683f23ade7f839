//! Filters and methods whose results may be longer than their inputs, or that go through long lists.

use minijinja::{
    Environment, Error, State, Value, filters,
    value::{Kwargs, Rest, ValueOrKwargs},
};

use super::{
    budget::{check_size, on_time, step},
    refused,
};

/// Widest field, indentation or group.
const MAX_WIDTH: usize = 10_000;

/// Bytes of a text that is gone through in less time than a look at the clock takes.
const SHORT: usize = 1024;

/// A filter's or a method's result, if it isn't too long.
///
/// # Errors
/// A text that is longer than values may be, or no time left.
pub fn within(result: Value) -> Result<Value, Error> {
    if let Some(text) = result.as_str()
        && text.len() > SHORT
    {
        on_time()?;
        check_size(text.len())?;
    }
    Ok(result)
}

/// Asks how long the result of a filter, or of a method of `value`, will be, where it isn't bounded by its input. The result
/// then goes through [`within`].
///
/// # Errors
/// What would be longer than values may be, or no time left.
pub fn measured(name: &str, value: &Value, args: &[Value]) -> Result<(), Error> {
    let text = value.as_str();
    match text {
        Some(text) if text.len() <= SHORT => step()?,
        _ => on_time()?,
    }
    let arg = |index: usize| args.get(index).and_then(Value::as_str);
    match (name, text) {
        ("replace", Some(text)) => match (arg(0), arg(1)) {
            (Some(""), Some(new)) => check_size(text.len().saturating_mul(new.len() + 1)),
            (Some(old), Some(new)) if new.len() > old.len() => {
                check_size(text.len() + text.matches(old).count().saturating_mul(new.len() - old.len()))
            }
            _ => Ok(()),
        },
        // The filter has the list first, the method the text between.
        ("join", None) => joined(value, arg(0).map_or(0, str::len)),
        ("join", Some(between)) if args.first().is_some_and(|list| list.as_str().is_none()) => {
            joined(&args[0], between.len())
        }
        ("join", Some(text)) => check_size(text.len().saturating_mul(1 + arg(0).map_or(0, str::len))),
        ("indent", Some(text)) => {
            let named = args.last().and_then(|last| Kwargs::try_from(last.clone()).ok());
            let named = named.and_then(|named| named.get::<Option<usize>>("width").ok().flatten());
            let width = args.first().and_then(|width| usize::try_from(width.clone()).ok()).or(named);
            let width = small(name, width.unwrap_or(4))?;
            check_size(text.len() + text.split('\n').count().saturating_mul(width))
        }
        ("batch" | "slice", _) => match args.first().map(|count| usize::try_from(count.clone())) {
            Some(Ok(count)) => small(name, count).map(drop),
            _ => Ok(()),
        },
        ("format", Some(text)) => fields(text, args),
        _ => Ok(()),
    }
}

fn small(name: &str, width: usize) -> Result<usize, Error> {
    match width <= MAX_WIDTH {
        true => Ok(width),
        false => Err(refused(format!("{name}: expected at most {MAX_WIDTH}, found {width}"))),
    }
}

fn joined(list: &Value, between: usize) -> Result<(), Error> {
    let mut size = 0usize;
    for item in list.try_iter()? {
        size = size.saturating_add(between + item.as_str().map_or(32, str::len));
        check_size(size)?;
    }
    Ok(())
}

/// Widths in a format stand in it, or are arguments.
fn fields(format: &str, args: &[Value]) -> Result<(), Error> {
    let digits = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    for digits in digits {
        small("format", digits.parse().unwrap_or(usize::MAX))?;
    }
    let bare = format.replace("{{", "");
    // `%*d`, or a field within a field.
    let takes_widths = format.contains('*') || bare.split('{').skip(1).any(|field| !field.contains('}'));
    let mut inserted = 0usize;
    for arg in args {
        if let Ok(number) = i128::try_from(arg.clone())
            && takes_widths
        {
            small("format", usize::try_from(number.unsigned_abs()).unwrap_or(usize::MAX))?;
        }
        inserted += arg.as_str().map_or(64, str::len);
    }
    // A field by its number may repeat an argument.
    let count = format.matches(['%', '{']).count();
    check_size(format.len() + count.saturating_mul(inserted.max(64)))
}

/// minijinja's own filters under names that templates can't use, and in their places ones that look at the budget.
macro_rules! guard {
    ($environment:expr, $($name:ident)*) => {
        $({
            const PLAIN: &str = concat!("__kiln_", stringify!($name));
            $environment.add_filter(PLAIN, filters::$name);
            // Values alone would refuse named arguments.
            $environment.add_filter(stringify!($name), |state: &mut State, args: Rest<ValueOrKwargs>| {
                let args = args.into_values();
                if let Some((value, args)) = args.split_first() {
                    measured(stringify!($name), value, args)?;
                }
                within(state.apply_filter(PLAIN, &args)?)
            });
        })*
    };
}

pub(super) fn install(environment: &mut Environment<'static>) {
    guard!(environment, replace join split lines dictsort items reverse sort list batch slice sum indent select reject selectattr
        rejectattr map groupby unique chain zip pprint format min max string);
}
