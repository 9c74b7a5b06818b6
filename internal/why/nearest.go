package why

import (
	"fmt"
	"path"
	"slices"
	"strings"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/nearmiss"
)

// nearest names the selector that keeps the nearest entry from matching, or is nil if none comes near.
func (d *diagnosis) nearest(p *agentv1.Process, near []*agentv1.Candidate) *Cause {
	c := near[0]
	held := len(c.GetSelectors()) - len(c.GetDifferences())
	likely := held > 0
	for _, x := range c.GetDifferences() {
		likely = likely || nearmiss.Kind(x.GetKind()).Near() || nearmiss.Kind(x.GetKind()) == nearmiss.TypeAbsent
	}
	main := mainDifference(c.GetDifferences())
	code, text := d.explain(p, c, main)
	if code == AttestorFailed || code == BinaryReplaced || code == BinaryNotVisible || code == NotInContainer || code == NotInUnit {
		likely = true
	}
	if !likely {
		return nil
	}
	out := cause(code, "the nearest entry is %s for %s: %s", c.GetEntryId(), c.GetSpiffeId(), text)
	for _, x := range c.GetDifferences() {
		if x != main {
			_, more := d.explain(p, c, x)
			out.Text += "; and " + more
		}
	}
	if c.GetExpired() {
		out.Text += "; it has ended, too"
	}
	return d.repair(out, p, c)
}

// distance is how far an entry is from matching.
func distance(c *agentv1.Candidate) (n int) {
	for _, x := range c.GetDifferences() {
		n += nearmiss.Kind(x.GetKind()).Cost()
	}
	return n
}

// weight orders differences by how much they say.
var weight = map[nearmiss.Kind]int{nearmiss.TypeAbsent: 0, nearmiss.Contradiction: 1, nearmiss.Absent: 3}

func mainDifference(all []*agentv1.Difference) *agentv1.Difference {
	return slices.MinFunc(all, func(a, b *agentv1.Difference) int {
		w := func(x *agentv1.Difference) int {
			if w, ok := weight[nearmiss.Kind(x.GetKind())]; ok {
				return w
			}
			return 2
		}
		return w(a) - w(b)
	})
}

// explain says what is wrong with one selector.
func (d *diagnosis) explain(p *agentv1.Process, c *agentv1.Candidate, x *agentv1.Difference) (Code, string) {
	want := x.GetSelector()
	typ, rest, _ := strings.Cut(want, ":")
	kind, value, _ := strings.Cut(rest, ":")
	have := strings.Join(x.GetHave(), ", ")
	failed := methodError(p, typ)
	label := strings.Contains(kind, "label")
	switch nearmiss.Kind(x.GetKind()) {
	case nearmiss.TypeAbsent:
		if !slices.Contains([]string{"systemd", "docker", "k8s"}, typ) {
			return TypeNotAttested, fmt.Sprintf("it wants %s, and no attestor makes selectors of the type %s; there are unix, systemd, docker and k8s", want, typ)
		}
		return TypeNotAttested, fmt.Sprintf("it wants %s, and this agent does not attest %s: set workload_attestation.%s in its configuration", want, typ, typ)
	case nearmiss.Contradiction:
		return SelectorsTwoOfOne, fmt.Sprintf("it wants %s and another value of the same, and all selectors of an entry must hold at once: no process has both; make an entry for each", want)
	case nearmiss.Case:
		return WrongCase, fmt.Sprintf("it wants %s, and the process has %s: upper and lower case count", want, have)
	case nearmiss.Space:
		return StraySpace, fmt.Sprintf("it wants %q, and the process has %q: white space, or a slash at the end, counts", want, have)
	case nearmiss.PathAlias:
		return PathAlias, fmt.Sprintf("it wants %s, which leads to the same file, and the process runs %s: the name without symbolic links counts", want, have)
	case nearmiss.ImageForm:
		return ImageForm, fmt.Sprintf("it wants %s, and the process has %s: registry, tag and digest count", want, have)
	case nearmiss.NameForNumber:
		return NameForNumber, fmt.Sprintf("it wants %s, which is a name where a number belongs or the other way round: the process has %s", want, have)
	case nearmiss.Supplementary:
		return GroupDiffers, fmt.Sprintf("it wants %s as the primary group, and the process has it as a supplementary one: %s", want, have)
	case nearmiss.Typo:
		return Typo, fmt.Sprintf("it wants %s, and the process has %s: a typing error?", want, have)
	case nearmiss.Hash:
		return HashDiffers, fmt.Sprintf("it wants %s, and the program that runs has %s: it was built or updated since", want, have)
	case nearmiss.Absent:
		return d.absent(p, want, typ, kind, failed)
	}
	switch {
	case typ == "unix" && (kind == "uid" || kind == "user"):
		return UserDiffers, fmt.Sprintf("it is for %s, and the process is %s", want, have)
	case typ == "unix" && (kind == "gid" || kind == "group"):
		return GroupDiffers, fmt.Sprintf("it is for %s, and the process is %s", want, have)
	case typ == "unix" && strings.HasPrefix(kind, "supplementary"):
		return GroupMissing, fmt.Sprintf("it wants %s, and the process is not in that group (it has %s): who was added to a group must log in anew, and a service be restarted", want, have)
	case typ == "unix" && kind == "path":
		return PathDiffers, fmt.Sprintf("it is for the program %s, and the process runs %s", value, have)
	case label:
		return LabelDiffers, fmt.Sprintf("it wants %s, and the process has %s", want, have)
	}
	return fieldCode(want), fmt.Sprintf("it wants %s, and the process has %s", want, have)
}

// absent says why a process has nothing of a kind.
func (d *diagnosis) absent(p *agentv1.Process, want, typ, kind, failed string) (Code, string) {
	switch {
	case typ == "unix" && (kind == "path" || kind == "sha256"):
		if strings.HasSuffix(p.GetExecutable(), " (deleted)") {
			return BinaryReplaced, fmt.Sprintf("it wants %s, and the file that process %d runs was deleted or replaced since it began (%s): restart it", want, p.GetPid(), p.GetExecutable())
		}
		if failed != "" {
			return BinaryNotVisible, fmt.Sprintf("it wants %s, which the agent cannot find out: %s", want, failed)
		}
	case strings.HasPrefix(kind, "supplementary"):
		return GroupMissing, fmt.Sprintf("it wants %s, and the process is in no supplementary group: who was added to a group must log in anew, and a service be restarted", want)
	}
	if failed != "" {
		return AttestorFailed, fmt.Sprintf("it wants %s, and the agent could not find out what %s says of the process: %s", want, typ, failed)
	}
	if away := d.unavailable(typ); away != "" {
		return AttestorFailed, fmt.Sprintf("it wants %s, and what the attestor %s asks does not answer: %s", want, typ, away)
	}
	if !slices.ContainsFunc(p.GetMethods(), func(m *agentv1.Method) bool { return m.GetName() == typ && len(m.GetSelectors()) > 0 }) {
		switch typ {
		case "docker", "k8s":
			return NotInContainer, fmt.Sprintf("it wants %s, and as far as the attestor %s knows, process %d is in no container: it runs on the host, or under another engine", want, typ, p.GetPid())
		case "systemd":
			return NotInUnit, fmt.Sprintf("it wants %s, and systemd has no unit for process %d, or there is no systemd on this machine: a shell's child is in the unit of the session", want, p.GetPid())
		}
	}
	if strings.Contains(kind, "label") {
		return LabelMissing, fmt.Sprintf("it wants %s, and the process has no such label", want)
	}
	return SelectorMissing, fmt.Sprintf("it wants %s, and the process has nothing of that kind", want)
}

func methodError(p *agentv1.Process, name string) string {
	for _, m := range p.GetMethods() {
		if m.GetName() == name {
			return m.GetError()
		}
	}
	return ""
}

func (d *diagnosis) unavailable(name string) string {
	for _, a := range d.status.GetAttestors() {
		if a.GetName() == name {
			return a.GetUnavailable()
		}
	}
	return ""
}

// repair writes the command that makes an entry match, where one can.
func (d *diagnosis) repair(out *Cause, p *agentv1.Process, c *agentv1.Candidate) *Cause {
	switch out.Code {
	case AttestorFailed, TypeNotAttested, BinaryNotVisible, GroupMissing, NotInContainer, NotInUnit:
		return out
	case BinaryReplaced:
		return out.fix("# restart process %d", p.GetPid())
	case SelectorsTwoOfOne:
		return out.fix("%s", d.create(p))
	}
	if c.GetRemovedAt() != nil {
		return out
	}
	selectors := slices.Clone(c.GetSelectors())
	for _, x := range c.GetDifferences() {
		i := slices.Index(selectors, x.GetSelector())
		if len(x.GetHave()) == 0 {
			return out // nothing to put in its place
		}
		selectors[i] = x.GetHave()[0]
	}
	if strings.HasPrefix(c.GetEntryId(), podEntryPrefix) {
		selectors = slices.DeleteFunc(selectors, func(s string) bool { return strings.HasPrefix(s, "k8s:pod-uid:") })
		return out.fix("# in the template by which the pod has the entry, which `signet why NAMESPACE/POD` names where the CA can be asked: %s", strings.Join(selectors, ", "))
	}
	if name, ok := strings.CutPrefix(c.GetEntryId(), "identity."); ok {
		return out.fix("# in the document of Identity %s: match: [%s]; then signet apply -f FILE", name, strings.Join(selectors, ", "))
	}
	return out.fix("signet entry update %s%s", quote(c.GetEntryId()), selectorFlags(selectors))
}

func selectorFlags(selectors []string) string {
	var b strings.Builder
	for _, s := range selectors {
		b.WriteString(" --selector " + quote(s))
	}
	return b.String()
}

// create writes the command that makes an entry for a process: for its user and program, or its pod's service account.
func (d *diagnosis) create(p *agentv1.Process) string {
	var selectors []string
	name := ""
	pick := func(prefix string) (string, bool) {
		for _, m := range p.GetMethods() {
			for _, s := range m.GetSelectors() {
				if v, ok := strings.CutPrefix(s, prefix); ok {
					selectors = append(selectors, s)
					return v, true
				}
			}
		}
		return "", false
	}
	if ns, ok := pick("k8s:ns:"); ok {
		if sa, ok := pick("k8s:sa:"); ok {
			name = "/ns/" + ns + "/sa/" + sa
		}
	}
	if name == "" {
		selectors = nil
		if _, ok := pick("unix:user:"); !ok {
			pick("unix:uid:")
		}
		if file, ok := pick("unix:path:"); ok {
			name = "/" + segment(path.Base(file))
		}
	}
	if name == "" || name == "/" {
		name = "/service"
	}
	return d.createEntry(name, selectors)
}

// segment makes a path segment of a file's name.
func segment(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.", r) {
			return r
		}
		return '-'
	}, strings.TrimLeft(name, "."))
}

func (d *diagnosis) createEntry(id string, selectors []string) string {
	return fmt.Sprintf("signet entry create --spiffe-id %s --parent-id %s%s", quote(id), quote(d.status.GetId()), selectorFlags(selectors))
}

// quote makes a word of a shell's command of s. Control characters have no place in one.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-:+,@%=") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
