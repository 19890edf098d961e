package main

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"unicode"

	yaml "sigs.k8s.io/yaml/goyaml.v2"
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

// newPolicy reads GITHUB_ALLOWED_ORG, GITHUB_ALLOWED_ORG_ID and TRUST_POLICY.
// Without a trust policy, every job of those organisations that runs for one of
// the default events may ask for any image.
func newPolicy(orgs, ownerIDs []string, trust string) (*policy, error) {
	p := &policy{ownerIDs: ownerIDs}
	for _, org := range orgs {
		p.orgs = append(p.orgs, lowerASCII(org))
	}
	if len(orgs) == 0 || slices.Contains(orgs, "") || slices.Contains(ownerIDs, "") {
		return nil, errors.New("GITHUB_ALLOWED_ORG, GITHUB_ALLOWED_ORG_ID: missing or empty; expected at least one owner, and ids that are numbers")
	}
	if trust == "" {
		p.rules = []rule{{"default rule", []condition{defaultCondition}, []pattern{newPattern("*")}}}
		return p, nil
	}
	var err error
	if p.rules, err = parseRules(trust); err != nil {
		return nil, fmt.Errorf("TRUST_POLICY (--trust-policy): %w", err)
	}
	return p, nil
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
// match is an error: a policy that means something else than its author must
// not start.
func parseRules(text string) ([]rule, error) {
	// sigs.k8s.io/yaml itself reads only the first document, and makes strings of
	// keys that are none.
	decoder := yaml.NewDecoder(strings.NewReader(text))
	decoder.SetStrict(true) // duplicate keys
	var document any
	if err := decoder.Decode(&document); err != nil && err != io.EOF {
		return nil, errors.New(strings.Join(strings.Fields(err.Error()), " "))
	}
	if err := decoder.Decode(new(any)); err != io.EOF {
		return nil, errors.New("more than one YAML document; expected one list of rules")
	}
	list, _ := document.([]any)
	if len(list) == 0 {
		return nil, errors.New(`no rules; expected a list, such as [{claims: {ref: refs/heads/main}, images: ["ghcr.io/{repository}:dev"]}]`)
	}
	rules := make([]rule, len(list))
	for i, item := range list {
		r, err := parseRule(item)
		if err != nil {
			return nil, fmt.Errorf("rule %d: %w", i+1, err)
		}
		r.name = fmt.Sprintf("rule %d", i+1)
		rules[i] = r
	}
	return rules, nil
}

func parseRule(item any) (r rule, err error) {
	members, _ := item.(map[any]any)
	for name := range members {
		if name != "claims" && name != "images" {
			return r, fmt.Errorf("unknown member %q; expected claims and images", fmt.Sprint(name))
		}
	}
	named, _ := members["claims"].(map[any]any)
	if len(named) == 0 {
		return r, errors.New("no claims; expected names with values, such as claims: {ref: refs/heads/main}")
	}
	// A rule that does not name the event gets the default ones, even beside a
	// rule that names others: to let pull requests restart preview images must
	// not open the rule for production.
	if _, ok := named["event_name"]; !ok {
		r.conditions = append(r.conditions, defaultCondition)
	}
	for _, key := range slices.SortedFunc(maps.Keys(named), func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) }) {
		name, ok := key.(string)
		if !ok {
			return r, fmt.Errorf("claim name %v is not a string; put it in quotes", key)
		}
		if strings.ContainsFunc(name, notText) {
			return r, fmt.Errorf("claim name %q has a control character", name)
		}
		values, ok := named[key].([]any)
		if !ok {
			values = []any{named[key]}
		}
		patterns, err := parsePatterns(values, func(s string) error { return checkValue(name, s) })
		if err != nil {
			return r, fmt.Errorf("claim %s: %w", name, err)
		}
		r.conditions = append(r.conditions, condition{name, patterns})
	}
	images, ok := members["images"].([]any)
	if !ok {
		return r, errors.New(`no images; expected a list, such as images: ["ghcr.io/{repository}:dev"]`)
	}
	if r.images, err = parsePatterns(images, checkImage); err != nil {
		return r, fmt.Errorf("images: %w", err)
	}
	return r, nil
}

func parsePatterns(values []any, check func(string) error) (patterns []pattern, err error) {
	if len(values) == 0 {
		return nil, errors.New("an empty list; expected at least one value")
	}
	for _, value := range values {
		switch value := value.(type) {
		case string:
			if strings.ContainsFunc(value, notText) {
				return nil, fmt.Errorf("%q has a control character; no claim and no image has one", value)
			}
			if err := check(value); err != nil {
				return nil, err
			}
			patterns = append(patterns, newPattern(value))
		case nil:
			return nil, errors.New(`no value; expected a string, "" if the claim must be empty`)
		case bool:
			return nil, fmt.Errorf("%t is not a string; put on, off, yes, no, true and false in quotes, or YAML reads them so", value)
		case []any, map[any]any:
			return nil, errors.New("a list or map as value; expected a string")
		default:
			return nil, fmt.Errorf("%v is not a string; put it in quotes, as claims are strings, ids included", value)
		}
	}
	return patterns, nil
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

// checkValue refuses what the claim of that name can never be.
func checkValue(name, s string) error {
	if placeholderRE.MatchString(s) {
		return fmt.Errorf("%q has a placeholder; expected one in images only", s)
	}
	if slices.Contains([]string{"aud", "exp", "iat", "nbf"}, name) {
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
