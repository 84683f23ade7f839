use std::time::{Duration, Instant};

use crate::chat::{ChatTemplate, Message, TemplateContext};

/// Renders a conversation of two messages; how it ended.
fn outcome(source: &str) -> Result<String, String> {
    let messages = [Message::new("user", "hi"), Message::new("assistant", "hello")];
    let render = || ChatTemplate::new(source)?.render(&messages, false, &TemplateContext::default());
    render().map_err(|error| error.to_string())
}

/// Filters are given their named arguments; what is expected is jinja2's.
#[test]
fn filters_take_named_arguments() {
    let people = "{% set people = [{'n': 'b', 'g': 1}, {'n': 'A', 'g': 2}, {'n': 'c', 'g': 1}] %}";
    for (source, expected) in [
        ("{{ people | map(attribute='n') | join(d='-') }}", "b-A-c"),
        ("{{ people | map(attribute='x', default='?') | join }}", "???"),
        ("{{ people | sort(attribute='n') | map(attribute='n') | join }}", "Abc"),
        ("{{ [2, 3, 1] | sort(reverse=true) | join }}", "321"),
        ("{{ people | unique(attribute='g') | map(attribute='n') | join }}", "bA"),
        ("{{ people | sum(attribute='g') }}", "4"),
        ("{{ people | selectattr('g', 'equalto', 1) | map(attribute='n') | join }}", "bc"),
        ("{% for g, all in people | groupby(attribute='g') %}{{ g }}{{ all | length }}{% endfor %}", "1221"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort(by='value') %}{{ k }}{% endfor %}", "ba"),
        ("{{ 'x\ny' | indent(width=2) }}", "x\n  y"),
        ("{{ 'x\ny' | indent(width=1, first=true) }}", " x\n y"),
    ] {
        assert_eq!(outcome(&format!("{people}{source}")).as_deref(), Ok(expected), "{source}");
    }
}

/// Templates that ask for memory, time or stack without end, by the resource.
fn hostile() -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    let doubling = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}";
    // Texts that double.
    for double in [
        "{% set ns.x = ns.x ~ ns.x %}",
        "{% set ns.x = ns.x + ns.x %}",
        "{% set ns.x = ns.x * 2 %}",
        "{% set ns.x = [ns.x, ns.x] | join %}",
        "{% set ns.x = ns.x | replace('a', 'aa') %}",
        "{% set ns.x = ns.x.replace('a', 'aa') %}",
        "{% set ns.x = ns.x.replace('', 'aa') %}",
        "{% set ns.x = 'x'.join([ns.x, ns.x]) %}",
        "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}",
        "{% set ns.x = '{0}{0}'.format(ns.x) %}",
        "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}",
        "{% set x | trim %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}",
        "{% with y = ns.x ~ ns.x %}{% set ns.x = y %}{% endwith %}",
        "{% set a, b = ns.x ~ ns.x, 1 %}{% set ns.x = a %}",
        "{% set (a, b) = (ns.x ~ ns.x, 1) %}{% set ns.x = a %}",
        "{% set ns.x = ([ns.x, ns.x] | tojson) %}",
        "{% set ns.x = ([ns.x, ns.x] | string) %}",
        "{% set ns.x = ([ns.x, ns.x] | pprint) %}",
        "{% set ns.x = ns.x | tojson | tojson %}",
        "{% set ns.x = (ns.x ~ '\n') | indent(9) | replace('\n', '\n\n') ~ ns.x %}",
        "{% filter upper %}{{ ns.x }}{% set ns.x = ns.x ~ ns.x %}{% endfilter %}",
        "{{ ns.x }}{% set ns.x = ns.x ~ ns.x %}",
    ] {
        all.push(("doubled text", format!("{doubling}{double}{{% endfor %}}{{{{ ns.x | length }}}}")));
    }
    // Lists that double.
    for double in [
        "{% set ns.x = ns.x + ns.x %}",
        "{% set ns.x = [ns.x, ns.x] %}",
        "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
        "{% set ns.x = (ns.x, ns.x) %}",
        "{% set ns.x = ns.x + ns.x + 1 %}",
        "{% set y = [ns.x, ns.x][0] + 1 %}{% set ns.x = [ns.x, ns.x] %}",
        "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
        "{% set ns.x = ns.x | map('string') | list + ns.x %}",
        "{% set ns.x = ns.x | chain(ns.x) | list %}",
        "{% set ns.x = ns.x | batch(1) | list + ns.x %}",
        "{% set ns.x = ns.x * 3 %}",
        "{% set ns.x = [ns.x | list, ns.x | list] | sum(start=[]) %}",
    ] {
        let begin = doubling.replace("'aaaaaaaa'", "[1, 2, 3]");
        all.push(("doubled list", format!("{begin}{double}{{% endfor %}}{{{{ ns.x | string | length }}}}")));
    }
    // One call that asks for much.
    for call in [
        r"'a\nb' | indent(10000000000)",
        r"'a\nb' | indent(width=10000000000)",
        "'%10000000000d' | format(1)",
        "'%*d' | format(10000000000, 1)",
        "'%.10000000000f' | format(1.5)",
        "'{:>10000000000}'.format(1)",
        "'{:>{}}'.format(1, 10000000000)",
        "'x' * 10000000000",
        "10000000000 * 'x'",
        "[1] * 10000000000",
        "('x' * 64) * 64 * 64 * 64 * 64",
        "range(10000000000) | list",
        "[1] | batch(10000000000, 0)",
        "[1] | batch(10000000, 0) | list",
        "[1] | slice(10000000000, 0)",
        "[1] | slice(10000000) | list",
        "'x'.center(10000000000)",
        "'x' | center(10000000000)",
        "'x'.zfill(10000000000)",
        "{'a': 1} | tojson(indent=10000000000)",
        "range(100000) | join('x' * 64)",
        "lipsum(100000000)",
        "'a'.ljust(10000000000)",
        "'a\tb'.expandtabs(10000000000)",
        "'x' | truncate(10000000000, true, 'y' * 64)",
        "debug()",
        "'x' ** 10000000000",
        "2 ** 10000000000",
    ] {
        all.push(("one call", format!("{{{{ {call} }}}}")));
        all.push((
            "one call",
            format!("{{% set x = {call} %}}{{% for i in range(1000) %}}{{{{ x }}}}{{% endfor %}}"),
        ));
    }
    // What is printed.
    let text = "0123456789abcdef".repeat(4000);
    let loops = |inside: &str| {
        format!(
            "{{% for a in range(10000) %}}{{% for b in range(900) %}}{inside}{{% endfor %}}{{% endfor %}}"
        )
    };
    all.push(("output", loops(&text)));
    all.push(("output", format!("{{% set x %}}{}{{% endset %}}", loops(&text))));
    all.push(("output", format!("{{% filter upper %}}{}{{% endfilter %}}", loops(&text))));
    all.push(("output", format!("{{% set x = '{text}' %}}{}", loops("{{ x }}"))));
    all.push(("output", format!("{{% macro m() %}}{text}{{% endmacro %}}{}", loops("{{ m() }}"))));
    all.push((
        "output",
        format!(
            "{{% macro m() %}}{{{{ caller() }}}}{{% endmacro %}}{}",
            loops(&format!("{{% call m() %}}{text}{{% endcall %}}"))
        ),
    ));
    all.push(("output", loops("{{ range(1000) | list }}")));
    // Macros that call themselves with more.
    all.push(("macro", "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('aaaaaaaa') }}".into()));
    all.push(("macro", "{% macro m(x, y='aaaaaaaa') %}{{ m(x, y=y ~ y) }}{% endmacro %}{{ m(1) }}".into()));
    all.push(("macro", "{% macro m(x) %}{{ m([x, x]) }}{% endmacro %}{{ m([1]) }}".into()));
    all.push(("macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into()));
    all.push(("macro", "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}".into()));
    // Time.
    for work in [
        "{% set x = range(100000) | list %}",
        "{% set x = range(9000) | list %}",
        "{% set x = t | upper %}",
        "{% set x = t | reverse %}",
        "{% set x = range(9000) | sum %}",
        "{% set x = t.find('zzz') %}",
        "{% set x = t[:] %}",
        "{% set x = t[::-1] %}",
        "{% set x = r[:] %}",
        "{% set x = r + r %}",
        "{% set x = r | sort %}",
        "{% set x = r | unique | list %}",
        "{% set x = r | groupby('a') %}",
        "{% if 'zzz' in t %}{% endif %}",
        "{% if -1 in r %}{% endif %}",
        "{% if r == r2 %}{% endif %}",
        "{% if (r) == (r2) %}{% endif %}",
        "{% if (r == 1 or r) != r2 %}{% endif %}",
        "{% if (1 == 1, r) == (1 == 1, r2) %}{% endif %}",
        "{% if ([r, r2][1 == 1]) == ([r2, r][1 == 1]) %}{% endif %}",
        "{% set x = r <= r2 %}",
        "{% for x in r if r == r2 %}{% endfor %}",
        "{% for x in r if 'zzz' in t recursive %}{% endfor %}",
        "{% if t.upper() == t.lower() %}{% endif %}",
        "{% for j in t %}{% endfor %}",
        "{% set x = t.split('a') %}",
        "{% set x = t | tojson %}",
        "{{ '' if t | upper == 'x' else '' }}",
        "{% if r | select('equalto', -1) | list %}{% endif %}",
        "{% if r | map('string') | list | sort %}{% endif %}",
        "{% if t is in(t) %}{% endif %}",
    ] {
        let begin = format!(
            "{{% set t = '{text}' %}}{{% set r = range(4000) | list %}}{{% set r2 = range(4000) | list %}}"
        );
        all.push(("time", format!("{begin}{}", loops(work))));
    }
    // Stack when rendering.
    all.push(("stack", "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into()));
    all.push(("stack", "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}".into()));
    all.push(("stack", "{% set ns = namespace() %}{% set ns.x = {'a': ns} %}{{ ns }}".into()));
    for nest in
        ["[ns.x]", "{'a': ns.x}", "(ns.x,)", "dict(a=ns.x)", "[ns.x] + []", "ns.x | list | batch(1) | list"]
    {
        for end in
            ["{{ ns.x }}", "{{ ns.x == ns.x }}", "{{ [ns.x, ns.x] | sort }}", "{{ ns.x | tojson }}", ""]
        {
            all.push(("stack", format!(
                "{{% set ns = namespace(x=[1]) %}}{{% for i in range(9999) %}}{{% for j in range(100) %}}{{% set ns.x = {nest} %}}{{% endfor %}}{{% endfor %}}{end}"
            )));
        }
    }
    all.push(("stack", "{% set ns = namespace() %}{% for i in range(9999) %}{% set ns = namespace(x=ns) %}{% set ns.y = 1 %}{% endfor %}{{ ns }}".into()));
    // Stack when compiling.
    let many = |text: &str, count: usize| text.repeat(count);
    for (before, again, after) in [
        ("{{ ", "not ", "x }}"),
        ("{{ x", " + 1", " }}"),
        ("{{ x", " ~ 1", " }}"),
        ("{{ x", " and 1", " }}"),
        ("{{ x", " or 1", " }}"),
        ("{{ x", " | trim", " }}"),
        ("{{ x", ".a", " }}"),
        ("{{ x", "[0]", " }}"),
        ("{{ x", "()", " }}"),
        ("{{ ", "(", "x }}"),
        ("{{ ", "[", "x }}"),
        ("{{ ", "-", "x }}"),
        ("{{ x", " is defined", " }}"),
        ("{{ x", " if 1 else x", " }}"),
        ("{{ x", " == 1", " }}"),
        ("{{ x", " in x", " }}"),
        ("{{ x", " // 1", " }}"),
        ("{{ x", " ** 1", " }}"),
        ("{{ ", "{1:", "x }}"),
        ("{% if x %}", "{% elif x %}", "{% endif %}"),
        ("", "{% if x %}", ""),
        ("", "{% for x in y %}", ""),
        ("", "{% filter trim %}", ""),
        ("", "{% set x %}", ""),
        ("", "{% macro m() %}", ""),
        ("", "{% with %}", ""),
    ] {
        for count in [2000, 10_000] {
            all.push(("compiling", format!("{before}{}{after}", many(again, count))));
        }
    }
    for broken in [
        "{%}",
        "{%%}",
        "{% with = 1 %}{% endwith %}",
        "{% for in %}",
        "{% for x in %}",
        "{% set %}",
        "{% set = %}",
        "{% macro %}",
        "{% call %}",
        "{% if %}",
        "{% endfor %}{% endset %}",
        "{%- -%}",
        "{{}}",
        "{% set x",
    ] {
        all.push(("broken", broken.into()));
    }
    all.push(("length", "x".repeat(10 << 20)));
    // Names that would get around this.
    all.push(("names", "{% set __kiln_keep = 1 %}".into()));
    all.push(("names", "{{ 'x' | __kiln_replace('x', 'y') }}".into()));
    all
}

/// Memory that this process has now, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    pages.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}

#[test]
fn hostile_templates_end_within_two_seconds_and_little_memory() {
    let all = hostile();
    let (mut refused, before) = (0, resident());
    for (kind, source) in &all {
        let start = Instant::now();
        let result = outcome(source);
        let (took, name) = (start.elapsed(), source.chars().take(120).collect::<String>());
        assert!(took < Duration::from_secs(2), "{kind}: {took:?} for {name}");
        let grown = resident().saturating_sub(before);
        assert!(grown < 300 << 20, "{kind}: {grown} bytes for {name}");
        refused += usize::from(result.is_err());
    }
    assert!(all.len() >= 200 && refused > all.len() * 3 / 4, "{} templates, {refused} refused", all.len());
}

#[test]
fn ordinary_constructs_render_as_before() {
    for (source, expected) in [
        ("{% set a = 'x' ~ 'y' %}{{ a }}", "xy"),
        ("{% set a, b = 1, 2 %}{{ b }}{{ a }}", "21"),
        ("{% set (a, b) = [1, 2] %}{{ b }}{{ a }}", "21"),
        (
            "{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m.role] %}{% endfor %}{{ ns.x | join(',') }}",
            "user,assistant",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{% set a = ns.n - 3 %}{{ a }}",
            "2-1",
        ),
        ("{% set a %} x {% endset %}[{{ a }}]", "[ x ]"),
        ("{% set a -%} x {%- endset -%}  [{{ a }}]", "[x]"),
        ("{% set a | trim %} x {% endset %}[{{ a }}]", "[x]"),
        ("{% with a = 1, b = [2, 3] | last %}{{ a }}{{ b }}{% endwith %}", "13"),
        (
            "{% macro m(a, b='z', c=['q', 'r'] | first) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m('x') }}{{ m('x', c=1) }}",
            "xzqxz1",
        ),
        (
            "{% macro m(a) %}<{{ caller(a ~ 1) }}>{% endmacro %}{% call(v) m('x') %}[{{ v }}]{% endcall %}",
            "<[x1]>",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "hi"),
        (
            "{% for m in messages | selectattr('role', 'equalto', 'assistant') -%}\n  {{ m.content }}\n{%- endfor %}",
            "hello",
        ),
        ("{% for m in messages %}\n{{ loop.index * 2 }}\n{% endfor %}", "2\n4\n"),
        ("{% for m in messages[::-1] %}{{ m.role }} {% endfor %}", "assistant user "),
        ("{% if 'h' in messages[0].content and not (1 + 1 == 3) %}y{% elif true %}n{% endif %}", "y"),
        ("{% for i in range(5) if i % 2 == 0 and i not in [4] %}{{ i }}{% endfor %}", "02"),
        ("{% if (1 == 1) != (2 == 3) %}{% set a = [1] == [1] %}{{ a }}{% endif %}", "True"),
        ("{{ x is defined }}{% set x = y %}{{ x is defined }}", "FalseFalse"),
        ("{{ {'a': [1, 2]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1,\n    2\n  ]\n}"),
        ("{{ 'a-b'.split('-') | map('upper') | join('+') }}", "A+B"),
        ("{{ '%03d|%s' | format(7, 'x') }}", "007|x"),
        ("{{ '  ' * 3 }}|", "      |"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        (
            "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
            "(1(2))3",
        ),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{% raw %}{{ x }}{% endraw %}", "{{ x }}"),
        ("{# {% for #}a", "a"),
    ] {
        assert_eq!(outcome(source).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn a_conversation_of_sixteen_thousand_messages_renders_in_proportion() {
    let template = "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}\
                    {% set content = m.content | trim %}{{ '<|' + m.role + '|>\n' ~ content ~ '<|end|>\n' }}{% endfor %}";
    let template = ChatTemplate::new(template).unwrap();
    let turns = ["user", "assistant"].map(|role| Message::new(role, "some words that were said "));
    let messages: Vec<Message> = turns.into_iter().cycle().take(16_000).collect();
    let text = template.render(&messages, false, &TemplateContext::default()).unwrap();
    assert_eq!(text.lines().count(), 32_000);
}
