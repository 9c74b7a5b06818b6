package spireresources

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"strings"
	"sync"
	"text/template"
	"text/template/parse"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Templates are programs: they loop, call each other and make long texts. Whoever may write a ClusterSPIFFEID must not be
// able to stop the CA by one. They are Go templates with the functions that these have of themselves, as
// spire-controller-manager has them, and run under bounds that count and do not measure time, so that every replica comes to
// the same result.
const (
	maxTemplateBytes = 16 << 10 // of the source
	maxResultBytes   = 8 << 10  // of what one writes
	maxValueBytes    = 64 << 10 // of what one function returns
	maxWork          = 50_000   // nodes of the template that are run, and bytes that its functions make by bytesPerWork
	bytesPerWork     = 64
)

var (
	errWork   = fmt.Errorf("it does more than %d steps; take loops out of it", maxWork)
	errResult = fmt.Errorf("its result has more than %d bytes", maxResultBytes)
	errVerbs  = fmt.Errorf("printf: more than %d verbs", maxVerbs)
	errValue  = fmt.Errorf("a function in it makes more than %d bytes", maxValueBytes)
)

// templateData is what templates see.
type templateData struct {
	TrustDomain   string
	ClusterName   string
	ClusterDomain string
	PodMeta       *metav1.ObjectMeta
	PodSpec       *corev1.PodSpec
	NodeMeta      *metav1.ObjectMeta
	NodeSpec      *corev1.NodeSpec
}

// A boundTemplate is a template that can be run. It is safe for concurrent use.
type boundTemplate struct {
	t *template.Template

	mu   sync.Mutex // held while it runs
	work int        // that is left
}

// The function that is put before the nodes of each list, and takes their number.
const stepFunction = "signet_step"

// parseTemplate refuses templates that could call themselves, as depth cannot be counted, and names of methods that change
// what they are called on: the pod is everybody's.
func parseTemplate(field, text string) (*boundTemplate, error) {
	fail := func(err error) (*boundTemplate, error) { return nil, fmt.Errorf("%s: %w", field, err) }
	if len(text) > maxTemplateBytes {
		return fail(fmt.Errorf("the template has %d bytes, at most %d are allowed", len(text), maxTemplateBytes))
	}
	parsed, err := template.New(field).Parse(text) // without the function of our own: nobody else calls it
	if err != nil {
		return fail(err)
	}
	b := &boundTemplate{}
	b.t = template.New(field).Funcs(b.functions())
	calls := map[string][]string{}
	for _, t := range parsed.Templates() {
		if t.Tree == nil || t.Root == nil {
			continue
		}
		w := &treeWalk{methods: unsafeMethods()}
		w.list(t.Root)
		if w.err != nil {
			return fail(w.err)
		}
		calls[t.Name()] = w.calls
		if _, err := b.t.AddParseTree(t.Name(), t.Tree); err != nil {
			return fail(err)
		}
	}
	if at := circle(calls); at != "" {
		return fail(fmt.Errorf("the template %q calls itself", at))
	}
	return b, nil
}

// execute runs the template.
func (b *boundTemplate) execute(data *templateData) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.work = maxWork
	var out boundWriter
	if err := b.t.Execute(&out, data); err != nil {
		for _, bound := range []error{errWork, errResult, errValue, errVerbs} {
			if errors.Is(err, bound) {
				return "", bound
			}
		}
		return "", clip(err)
	}
	return out.String(), nil
}

// boundWriter takes maxResultBytes.
type boundWriter struct{ strings.Builder }

func (w *boundWriter) Write(p []byte) (int, error) {
	if w.Len()+len(p) > maxResultBytes {
		return 0, errResult
	}
	return w.Builder.Write(p)
}

var _ io.Writer = (*boundWriter)(nil)

// spend takes from the work that is left.
func (b *boundTemplate) spend(n int) error {
	if b.work -= n; b.work < 0 {
		return errWork
	}
	return nil
}

// functions are those of text/template that make new text, with what they make counted.
func (b *boundTemplate) functions() template.FuncMap {
	counted := func(make func(args ...any) string) func(args ...any) (string, error) {
		return func(args ...any) (string, error) {
			s := make(args...)
			if len(s) > maxValueBytes {
				return "", errValue
			}
			return s, b.spend(1 + len(s)/bytesPerWork)
		}
	}
	return template.FuncMap{
		stepFunction: func(n int) (string, error) { return "", b.spend(n) },
		"print":      counted(fmt.Sprint),
		"println":    counted(fmt.Sprintln),
		"html":       counted(template.HTMLEscaper),
		"js":         counted(template.JSEscaper),
		"urlquery":   counted(template.URLQueryEscaper),
		"printf": func(format string, args ...any) (string, error) {
			if err := checkVerbs(format); err != nil { // each may ask for a million bytes of padding before they can be counted
				return "", err
			}
			return counted(func(args ...any) string { return fmt.Sprintf(format, args...) })(args...)
		},
	}
}

// widths returns what stands in the format between % and the verb, of all verbs.
func widths(format string) string {
	var out strings.Builder
	for i := 0; i < len(format); i++ {
		if format[i] != '%' {
			continue
		}
		for i++; i < len(format) && strings.IndexByte("+-# 0123456789.*[]", format[i]) >= 0; i++ {
			out.WriteByte(format[i])
		}
		out.WriteByte(' ')
	}
	return out.String()
}

const (
	maxVerbs = 256
	maxWidth = 1024
)

// checkVerbs refuses too many, widths and precisions of more than maxWidth, and those that are arguments.
func checkVerbs(format string) error {
	if strings.Count(format, "%") > maxVerbs {
		return errVerbs
	}
	for _, w := range strings.Fields(widths(format)) {
		if strings.Contains(w, "*") {
			return errors.New("printf: a width that is an argument (*) is not supported")
		}
		n := 0
		for _, c := range w {
			if c < '0' || c > '9' {
				n = 0
				continue
			}
			if n = 10*n + int(c-'0'); n > maxWidth {
				return fmt.Errorf("printf: a width of more than %d", maxWidth)
			}
		}
	}
	return nil
}

// treeWalk puts the counting function into a tree and looks for what is refused.
type treeWalk struct {
	methods map[string]bool
	calls   []string // other templates
	err     error
	nodes   int // since the list began
}

// list walks the nodes of a list and puts the count of all that is run when it is run before them.
func (w *treeWalk) list(l *parse.ListNode) {
	if l == nil {
		return
	}
	outer := w.nodes
	w.nodes = 1
	for _, n := range l.Nodes {
		w.node(n)
	}
	count := &parse.NumberNode{NodeType: parse.NodeNumber, Pos: l.Pos, IsInt: true, Int64: int64(w.nodes), IsUint: true, Uint64: uint64(w.nodes), IsFloat: true, Float64: float64(w.nodes), Text: fmt.Sprint(w.nodes)}
	call := &parse.CommandNode{NodeType: parse.NodeCommand, Pos: l.Pos, Args: []parse.Node{parse.NewIdentifier(stepFunction).SetPos(l.Pos), count}}
	step := &parse.ActionNode{NodeType: parse.NodeAction, Pos: l.Pos, Pipe: &parse.PipeNode{NodeType: parse.NodePipe, Pos: l.Pos, Cmds: []*parse.CommandNode{call}}}
	l.Nodes = append([]parse.Node{step}, l.Nodes...)
	w.nodes = outer
}

func (w *treeWalk) node(n parse.Node) {
	w.nodes++
	switch n := n.(type) {
	case *parse.ActionNode:
		w.pipe(n.Pipe)
	case *parse.IfNode:
		w.pipe(n.Pipe)
		w.list(n.List)
		w.list(n.ElseList)
	case *parse.WithNode:
		w.pipe(n.Pipe)
		w.list(n.List)
		w.list(n.ElseList)
	case *parse.RangeNode:
		w.pipe(n.Pipe)
		w.list(n.List)
		w.list(n.ElseList)
	case *parse.TemplateNode:
		w.calls = append(w.calls, n.Name)
		w.pipe(n.Pipe)
	case *parse.PipeNode:
		w.pipe(n)
	case *parse.FieldNode:
		w.names(n.Ident)
	case *parse.VariableNode:
		w.names(n.Ident[1:])
	case *parse.ChainNode:
		w.names(n.Field)
		w.node(n.Node)
	}
}

func (w *treeWalk) pipe(p *parse.PipeNode) {
	if p == nil {
		return
	}
	for _, c := range p.Cmds {
		w.nodes++
		for _, a := range c.Args {
			w.node(a)
		}
	}
}

func (w *treeWalk) names(names []string) {
	for _, n := range names {
		w.nodes++
		if w.methods[n] && w.err == nil {
			w.err = fmt.Errorf("the method %s cannot be called here", n)
		}
	}
}

// circle returns a template that calls itself, directly or by others; empty if none does.
func circle(calls map[string][]string) string {
	state := map[string]int{} // 1: on the way, 2: done
	var visit func(name string) string
	visit = func(name string) string {
		switch state[name] {
		case 1:
			return name
		case 2:
			return ""
		}
		state[name] = 1
		for _, next := range calls[name] {
			if at := visit(next); at != "" {
				return at
			}
		}
		state[name] = 2
		return ""
	}
	for name := range calls {
		if at := visit(name); at != "" {
			return at
		}
	}
	return ""
}

// harmless are methods that templates may call: they only show what the value holds, in few bytes.
var harmless = map[string]bool{
	"GetName": true, "GetGenerateName": true, "GetNamespace": true, "GetUID": true, "GetLabels": true, "GetAnnotations": true, "GetResourceVersion": true, "GetGeneration": true,
	"GetCreationTimestamp": true, "GetDeletionTimestamp": true, "GetFinalizers": true, "GetOwnerReferences": true, "GetSelfLink": true, "GetDeletionGracePeriodSeconds": true,
	"Unix": true, "UnixNano": true, "UnixMilli": true, "Year": true, "Month": true, "Day": true, "Hour": true, "Minute": true, "Second": true, "Weekday": true, "YearDay": true, "IsZero": true, "UTC": true, "Format": true,
	"Value": true, "MilliValue": true, "AsApproximateFloat64": true, "Sign": true, "IntValue": true,
}

// unsafeMethods are the names of all other methods that a template could reach from its data, but for those that are names
// of fields, too: what these two have in common is harmless, which a test watches.
var unsafeMethods = sync.OnceValue(func() map[string]bool {
	out, fields := map[string]bool{}, map[string]bool{}
	seen := map[reflect.Type]bool{}
	var visit func(t reflect.Type)
	visit = func(t reflect.Type) {
		if seen[t] {
			return
		}
		seen[t] = true
		for _, x := range []reflect.Type{t, reflect.PointerTo(t)} {
			for i := range x.NumMethod() {
				if name := x.Method(i).Name; !harmless[name] {
					out[name] = true
				}
			}
		}
		switch t.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Array:
			visit(t.Elem())
		case reflect.Map:
			visit(t.Key())
			visit(t.Elem())
		case reflect.Struct:
			for i := range t.NumField() {
				if f := t.Field(i); f.IsExported() {
					fields[f.Name] = true
					visit(f.Type)
				}
			}
		}
		for i := range t.NumMethod() { // what methods return can be asked in turn
			if m := t.Method(i); harmless[m.Name] {
				for o := range m.Type.NumOut() {
					visit(m.Type.Out(o))
				}
			}
		}
	}
	visit(reflect.TypeFor[templateData]())
	maps.DeleteFunc(out, func(name string, _ bool) bool { return fields[name] })
	return out
})

const maxErrorText = 300

// clip bounds the text of an error, which may hold what a template made.
func clip(err error) error {
	if s := err.Error(); len(s) > maxErrorText {
		return errors.New(s[:maxErrorText] + "...")
	}
	return err
}
