package main

import (
	"fmt"
	"maps"
	"regexp"
	"regexp/syntax"
	"strings"
)

// pattern is the text before, between and after the stars of a pattern; one
// element is text without a star.
type pattern []string

func newPattern(s string) pattern { return strings.Split(s, "*") }

func (p pattern) String() string { return strings.Join(p, "*") }

func joinPatterns(patterns []pattern) string {
	var texts []string
	for _, p := range patterns {
		texts = append(texts, fmt.Sprintf("%q", p))
	}
	return strings.Join(texts, "|")
}

// matches compares the whole of s. Each text is looked for once, right after
// the one before it, so the time is linear whatever the number of stars.
func (p pattern) matches(s string) bool {
	if len(p) == 1 {
		return s == p[0]
	}
	first, last := p[0], p[len(p)-1]
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, text := range p[1 : len(p)-1] {
		i := strings.Index(s, text)
		if i < 0 {
			return false
		}
		s = s[i+len(text):]
	}
	return true
}

// expand puts the verified claims in the place of the placeholders, in lower
// case as images are. A star in a claim stays a star: p was split before. It
// fails if a claim is absent or empty.
func (p pattern) expand(c claims) (expanded pattern, ok bool) {
	ok = true
	for _, text := range p {
		expanded = append(expanded, placeholderRE.ReplaceAllStringFunc(text, func(placeholder string) string {
			value := c[strings.Trim(placeholder, "{}")]
			ok = ok && value != ""
			return lowerASCII(value)
		}))
	}
	return expanded, ok
}

var (
	placeholderRE = regexp.MustCompile(`\{(repository|repository_owner|repository_id)\}`)
	bracesRE      = regexp.MustCompile(`\{\w+\}`)
	claimNameRE   = regexp.MustCompile(`^[A-Za-z][\w#$-]*$`)
	familiarRE    = regexp.MustCompile(`^(index\.docker\.io/|docker\.io/[^/*]*:)`)

	// The grammar of github.com/distribution/reference, with what canonical
	// references always have: a host that looks like one, and a tag.
	imageForm = func() string {
		host := `[0-9a-z]([0-9a-z-]*[0-9a-z])?`
		path := `[0-9a-z]+(([._]|__|-+)[0-9a-z]+)*`
		return `(localhost|` + host + `((\.` + host + `)+(:[0-9]+)?|:[0-9]+)|\[[0-9a-f:]+\](:[0-9]+)?)(/` + path + `)+:\w[\w.-]*`
	}()

	// claimForms are those that GitHub documents and people get wrong.
	claimForms = map[string]struct{ form, expected string }{
		"ref":                   {`(refs/(heads|tags|pull)/[^ ?\[\\^:~]+)?`, "refs/heads/name or refs/tags/name"},
		"ref_type":              {`branch|tag`, "branch or tag"},
		"ref_protected":         {`true|false`, `"true" or "false"`},
		"event_name":            {`[a-z_]+`, "the name of an event, such as push"},
		"repository":            {`[\w-]+/[\w.-]+`, "owner/name"},
		"repository_owner":      {`[\w-]+`, "an owner's name"},
		"repository_id":         {`\d+`, "a number"},
		"repository_owner_id":   {`\d+`, "a number"},
		"repository_visibility": {`public|private|internal`, "public, private or internal"},
		"runner_environment":    {`github-hosted|self-hosted`, "github-hosted or self-hosted"},
		"job_workflow_ref":      {`[\w-]+/[\w.-]+/.+@.+`, "owner/name/.github/workflows/file.yml@ref"},
		"workflow_ref":          {`[\w-]+/[\w.-]+/.+@.+`, "owner/name/.github/workflows/file.yml@ref"},
	}
)

// possible says whether any text matches both the pattern and, from end to end,
// the regular expression form. It walks the pattern through the automaton of
// the expression; a star leads to every state that can be reached from there.
func possible(p pattern, form string) bool {
	parsed, err := syntax.Parse(form, syntax.Perl)
	if err != nil {
		panic(err) // forms are constants
	}
	prog, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		panic(err)
	}
	type set map[uint32]bool
	var enter func(states set, pc uint32)
	enter = func(states set, pc uint32) {
		if states[pc] {
			return
		}
		states[pc] = true
		switch inst := prog.Inst[pc]; inst.Op {
		case syntax.InstAlt, syntax.InstAltMatch:
			enter(states, inst.Out)
			enter(states, inst.Arg)
		case syntax.InstCapture, syntax.InstNop:
			enter(states, inst.Out)
		}
	}
	step := func(states set, takes func(*syntax.Inst) bool) set {
		next := set{}
		for pc := range states {
			if inst := &prog.Inst[pc]; takes(inst) {
				enter(next, inst.Out)
			}
		}
		return next
	}
	states := set{}
	enter(states, uint32(prog.Start))
	for i, text := range p {
		for known := -1; i > 0 && known < len(states); {
			known = len(states)
			maps.Copy(states, step(states, func(inst *syntax.Inst) bool { return inst.Rune != nil }))
		}
		for _, char := range text {
			states = step(states, func(inst *syntax.Inst) bool { return inst.MatchRune(char) })
		}
	}
	for pc := range states {
		if prog.Inst[pc].Op == syntax.InstMatch {
			return true
		}
	}
	return false
}
