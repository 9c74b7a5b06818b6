package policy

import "strings"

// within returns where in the file the character stands that is at line and column, from 1, of the value of a scalar:
// YAML folds lines, cuts indentation off and escapes. If it is not found, it is where the scalar begins.
func (p *parser) within(scalar text, line, column int) (fileLine, fileColumn int) {
	source := strings.Split(string(p.source.Content), "\n")
	first := scalar.Line - max(p.source.Line, 1)
	if first < 0 || first >= len(source) {
		return scalar.Line, scalar.Column
	}
	at := spot{source: source, line: first, column: scalar.Column - 1}
	switch at.char() {
	case '|', '>': // of a block scalar the text begins on the next line
		at.line, at.column = at.line+1, 0
	case '"', '\'':
		at.column++
	}
	valueLine, valueColumn := 1, 1
	for _, r := range scalar.Value {
		if valueLine == line && valueColumn == column {
			break
		}
		if r == '\n' {
			valueLine, valueColumn = valueLine+1, 1
		} else {
			valueColumn++
		}
		if r == ' ' || r == '\n' {
			continue // as much of it as there is goes with the next character
		}
		if !at.find(r) {
			return scalar.Line, scalar.Column
		}
		at.column++
	}
	at.space()
	if at.line >= len(source) {
		return scalar.Line, scalar.Column
	}
	return at.line + max(p.source.Line, 1), at.column + 1
}

// A spot is a position in a text.
type spot struct {
	source       []string
	line, column int
}

// char returns the character there, 0 at the end of the text and '\n' at the end of a line.
func (p *spot) char() rune {
	if p.line >= len(p.source) {
		return 0
	}
	runes := []rune(p.source[p.line])
	if p.column >= len(runes) {
		return '\n'
	}
	return runes[p.column]
}

// space goes over spaces and ends of lines.
func (p *spot) space() {
	for {
		switch p.char() {
		case ' ', '\r':
			p.column++
		case '\n':
			p.line, p.column = p.line+1, 0
		default:
			return
		}
	}
}

// find goes to the next r.
func (p *spot) find(r rune) bool {
	for {
		switch p.char() {
		case 0:
			return false
		case r:
			return true
		case '\n':
			p.line, p.column = p.line+1, 0
		default:
			p.column++
		}
	}
}
