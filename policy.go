package main

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// defaultCondition holds for a rule that does not name event_name. Each of these
// events runs code that someone with write access put into the repository. The
// others may run a stranger's: tokens of pull_request_target and workflow_run
// look like main's in every claim but this one.
// https://docs.github.com/en/actions/reference/workflows-and-actions/events-that-trigger-workflows
var defaultCondition = condition{"event_name", []pattern{
	{"push"}, {"workflow_dispatch"}, {"repository_dispatch"}, {"release"}, {"schedule"}, {"registry_package"}, {"deployment"},
}}

// policy decides which verified jobs may ask, and for which images.
type policy struct {
	orgs     []string // lower case
	ownerIDs []string // empty: not pinned
	rules    []rule   // never empty
}

// rule admits the jobs that satisfy all its conditions, for requests in which
// every image matches one of its patterns.
type rule struct {
	name       string
	conditions []condition
	images     []pattern
}

// condition is satisfied by a claim that matches one of the values.
type condition struct {
	claim  string
	values []pattern
}

// newPolicy takes GITHUB_ALLOWED_ORG, GITHUB_ALLOWED_ORG_ID and the rules of
// TRUST_POLICY. Without a trust policy, every job of those organisations that
// runs for one of the default events may ask for any image.
func newPolicy(orgs, ownerIDs []string, trust []rule) *policy {
	p := &policy{ownerIDs: ownerIDs, rules: trust}
	for _, org := range orgs {
		p.orgs = append(p.orgs, lowerASCII(org))
	}
	if len(trust) == 0 {
		p.rules = []rule{{"default rule", []condition{defaultCondition}, []pattern{newPattern("*")}}}
	}
	return p
}

// admit decides on the claims alone: nil means that the job may ask. The error
// is for the log, and says for each rule what did not match.
func (p *policy) admit(c claims) error {
	if err := p.checkOwner(c); err != nil {
		return err
	}
	var mismatches []string
	for o := range p.outcomes(c, nil) {
		if o.admits {
			return nil
		}
		mismatches = append(mismatches, fmt.Sprintf("%s: %s is %s", o.rule.name, o.unmet.claim, c.shown(o.unmet.claim)))
	}
	return fmt.Errorf("no rule matches the claims: %s", strings.Join(mismatches, "; "))
}

func (p *policy) checkOwner(c claims) error {
	// GitHub's names are ASCII; strings.EqualFold takes U+212A for k.
	if !slices.Contains(p.orgs, lowerASCII(c["repository_owner"])) {
		return fmt.Errorf("repository_owner is %s, none of GITHUB_ALLOWED_ORG", c.shown("repository_owner"))
	}
	if len(p.ownerIDs) > 0 && !slices.Contains(p.ownerIDs, c["repository_owner_id"]) {
		return fmt.Errorf("repository_owner_id is %s, none of GITHUB_ALLOWED_ORG_ID", c.shown("repository_owner_id"))
	}
	return nil
}

// allow decides on the canonical references that an admitted job asks for. One
// rule must allow them all. The error may be told to the job.
func (p *policy) allow(c claims, images []string) error {
	if len(images) == 0 {
		return errors.New("no image was asked for")
	}
	most := 0 // images that a single rule allows, from the first
	for o := range p.outcomes(c, images) {
		if o.allows(images) {
			return nil
		}
		most = max(most, o.matched)
	}
	if most > 0 {
		return fmt.Errorf("this job may not restart %s, or not together with %s", images[most], images[0])
	}
	return fmt.Errorf("this job may not restart %s", images[0])
}

// outcome is what one rule says of a job and the images that it asks for.
type outcome struct {
	rule    *rule
	admits  bool      // the claims satisfy every condition
	unmet   condition // if not: the first that they do not satisfy
	matched int       // if so: images that it allows, from the first to the first that it does not
}

func (o *outcome) allows(images []string) bool { return o.admits && o.matched == len(images) }

// outcomes asks one rule after the other. Whatever decides or explains goes
// through here.
func (p *policy) outcomes(c claims, images []string) iter.Seq[outcome] {
	return func(yield func(outcome) bool) {
		for i := range p.rules {
			o := outcome{rule: &p.rules[i]}
			if o.unmet, o.admits = o.rule.mismatch(c); o.admits {
				for o.matched < len(images) && o.rule.allows(c, images[o.matched]) {
					o.matched++
				}
			}
			if !yield(o) {
				return
			}
		}
	}
}

// strangers returns the rules that let in, without naming them, events for which
// a stranger's code may run with a token that looks like main's.
func (p *policy) strangers() (rules []string) {
	for _, r := range p.rules {
		for _, cond := range r.conditions {
			if cond.claim == defaultCondition.claim && slices.ContainsFunc(cond.values, func(v pattern) bool {
				return len(v) > 1 && (v.matches("pull_request_target") || v.matches("workflow_run"))
			}) {
				rules = append(rules, r.name)
			}
		}
	}
	return rules
}

// describe returns a line for each rule in force.
func (p *policy) describe() []string {
	var lines []string
	for _, r := range p.rules {
		lines = append(lines, r.name+": "+r.String())
	}
	return lines
}

func (r *rule) String() string {
	var text string
	for _, cond := range r.conditions {
		text += cond.claim + "=" + joinPatterns(cond.values) + " "
	}
	return text + "may restart " + joinPatterns(r.images)
}

// mismatch returns the first condition that the claims do not satisfy, or true.
// An absent claim satisfies none, not even "*".
func (r *rule) mismatch(c claims) (unmet condition, ok bool) {
	for _, cond := range r.conditions {
		value, present := c[cond.claim]
		if !present || !slices.ContainsFunc(cond.values, func(p pattern) bool { return p.matches(value) }) {
			return cond, false
		}
	}
	return condition{}, true
}

func (r *rule) allows(c claims, image string) bool {
	return slices.ContainsFunc(r.images, func(p pattern) bool {
		p, ok := p.expand(c)
		return ok && p.matches(image)
	})
}

// parseRules reads TRUST_POLICY. What it does not understand or what could never
// match is an error that names the line: a policy that means something else than
// its author must not start.
func parseRules(text string) ([]rule, error) {
	decoder := yaml.NewDecoder(strings.NewReader(text))
	var document, second yaml.Node
	if err := decoder.Decode(&document); err != nil && err != io.EOF {
		// yaml's lines are those where the list or map began that it was in.
		return nil, errors.New(strings.ReplaceAll(strings.Join(strings.Fields(err.Error()), " "), " line ", " near line "))
	}
	if err := decoder.Decode(&second); err == nil {
		return nil, atLine(&second, "another YAML document; expected one list of rules")
	} else if err != io.EOF {
		return nil, errors.New("after the list of rules: " + strings.Join(strings.Fields(err.Error()), " "))
	}
	if len(document.Content) == 0 {
		return nil, errors.New("no rules; " + expectedRules)
	}
	items, ok := list(document.Content[0])
	if !ok || len(items) == 0 {
		return nil, atLine(document.Content[0], "no rules; %s", expectedRules)
	}
	var rules []rule
	for i, item := range items {
		r, err := parseRule(item)
		if err != nil {
			return nil, fmt.Errorf("rule %d, %w", i+1, err)
		}
		r.name = fmt.Sprintf("rule %d", i+1)
		rules = append(rules, r)
	}
	return rules, nil
}

const expectedRules = `expected a list, such as [{claims: {ref: refs/heads/main}, images: ["ghcr.io/{repository}:dev"]}]`

// atLine is an error in a policy: where, and what is wrong there.
func atLine(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("line %d: %w", n.Line, fmt.Errorf(format, args...))
}

// target is n, or what it is an alias of.
func target(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// list returns what is in a list that has no tag of its own.
func list(n *yaml.Node) (items []*yaml.Node, ok bool) {
	n = target(n)
	return n.Content, n.Kind == yaml.SequenceNode && n.ShortTag() == "!!seq"
}

func parseRule(item *yaml.Node) (r rule, err error) {
	members, err := parseMap(item)
	if err != nil {
		return r, err
	}
	claims, images := item, item
	for _, m := range members {
		switch m.name {
		case "claims":
			claims = m.value
		case "images":
			images = m.value
		default:
			return r, atLine(m.key, "unknown member %q; expected claims and images", m.name)
		}
	}
	if claims != item {
		members, err = parseMap(claims)
	}
	if err != nil {
		return r, err
	}
	if claims == item || len(members) == 0 {
		return r, atLine(claims, "no claims; expected names with values, such as claims: {ref: refs/heads/main}")
	}
	// A rule that does not name the event gets the default ones, even beside a
	// rule that names others: to let pull requests restart preview images must
	// not open the rule for production.
	if !slices.ContainsFunc(members, func(m member) bool { return m.name == defaultCondition.claim }) {
		r.conditions = append(r.conditions, defaultCondition)
	}
	for _, m := range members {
		if err := checkName(m.name); err != nil {
			return r, atLine(m.key, "%w", err)
		}
		patterns, err := parsePatterns("claim "+m.name, m.value, func(s string) error { return checkValue(m.name, s) })
		if err != nil {
			return r, err
		}
		r.conditions = append(r.conditions, condition{m.name, patterns})
	}
	if _, ok := list(images); !ok {
		return r, atLine(images, `no images; expected a list, such as images: ["ghcr.io/{repository}:dev"]`)
	}
	r.images, err = parsePatterns("images", images, checkImage)
	return r, err
}

// member is a name in a map with its value.
type member struct {
	name       string
	key, value *yaml.Node
}

// parseMap returns the members of a map in their order; none if n is no map, or
// one with a tag of its own.
func parseMap(n *yaml.Node) (members []member, err error) {
	n = target(n)
	if n.Kind != yaml.MappingNode || n.ShortTag() != "!!map" {
		return nil, nil
	}
	for i := 0; i < len(n.Content); i += 2 {
		m := member{key: n.Content[i], value: n.Content[i+1]}
		if m.name, err = parseString(m.key); err != nil {
			return nil, atLine(m.key, "a name: %w", err)
		}
		if slices.ContainsFunc(members, func(other member) bool { return other.name == m.name }) {
			return nil, atLine(m.key, "%q is there twice", m.name)
		}
		members = append(members, m)
	}
	return members, nil
}

// parsePatterns takes one string, or a list of them.
func parsePatterns(what string, n *yaml.Node, check func(string) error) (patterns []pattern, err error) {
	values, ok := list(n)
	if !ok {
		values = []*yaml.Node{n}
	}
	if len(values) == 0 {
		return nil, atLine(n, "%s: an empty list; expected at least one value", what)
	}
	for _, value := range values {
		s, err := parseString(value)
		if err == nil {
			err = check(s)
		}
		if err != nil {
			return nil, atLine(value, "%s: %w", what, err)
		}
		patterns = append(patterns, newPattern(s))
	}
	return patterns, nil
}

func parseString(n *yaml.Node) (string, error) {
	n = target(n)
	switch {
	case n.Kind != yaml.ScalarNode:
		return "", errors.New("a list or map; expected a string")
	case n.ShortTag() == "!!null":
		return "", errors.New(`no value; expected a string, "" if the claim must be empty`)
	case n.ShortTag() != "!!str":
		return "", fmt.Errorf("%q is not a string to YAML; put it in quotes, as claims are strings, ids included", n.Value)
	case strings.ContainsFunc(n.Value, notText):
		return "", fmt.Errorf("%q has a control character; no claim and no image has one", n.Value)
	}
	return n.Value, nil
}

// notText holds for what YAML lets in by escapes alone.
func notText(r rune) bool {
	return unicode.IsControl(r) || r == '\uFFFE' || r == '\uFFFF'
}

// checkImage refuses what no canonical reference can match.
func checkImage(s string) error {
	example, _ := newPattern(s).expand(claims{"repository": "owner/name", "repository_owner": "owner", "repository_id": "1"})
	if strings.ContainsAny(example.String(), "{}") {
		return fmt.Errorf("%q has an unknown placeholder; expected {repository}, {repository_owner} or {repository_id}", s)
	}
	// docker.io/nginx is docker.io/library/nginx in canonical form.
	if !possible(example, imageForm) || familiarRE.MatchString(example.String()) {
		return fmt.Errorf("%q can match no image; expected a registry, a name in lower case and a tag, such as ghcr.io/{repository}:v* or docker.io/library/nginx:*", s)
	}
	return nil
}

// checkName refuses what no claim is called. GitHub may add claims, and names
// repo_property_* after what an organisation calls its properties.
func checkName(name string) error {
	if !claimNameRE.MatchString(name) {
		return fmt.Errorf("%q is no name of a claim", name)
	}
	known := strings.ReplaceAll(lowerASCII(name), "-", "_")
	if _, ok := claimForms[known]; ok && name != known {
		return fmt.Errorf("%q is no name of a claim; expected %s", name, known)
	}
	return nil
}

// checkValue refuses what the claim of that name can never be.
func checkValue(name, s string) error {
	if bracesRE.MatchString(s) {
		return fmt.Errorf("%q has a placeholder; expected one in images only", s)
	}
	if slices.Contains([]string{"iss", "aud", "exp", "iat", "nbf"}, name) {
		return errors.New("cannot be matched; web checks it for every token")
	}
	if claim, ok := claimForms[name]; ok && !possible(newPattern(s), claim.form) {
		return fmt.Errorf("%q can match no token; expected %s", s, claim.expected)
	}
	return nil
}

// lowerASCII leaves every letter beyond ASCII alone: strings.ToLower makes a k
// of U+212A, and a name with it is somebody else's.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}
