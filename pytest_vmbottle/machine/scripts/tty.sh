# Prints the number of lines and columns of a virtual terminal, a byte each, and then its characters.
# Arguments: its number. Status: 3 if there is no such terminal.
# vcsa has the size and the cursor first; vcsu has the characters as Unicode, four bytes each (vcs(4)).
[ -e "/dev/vcsu$1" ] && [ -e "/dev/vcsa$1" ] || exit 3
head -c 2 "/dev/vcsa$1"
cat "/dev/vcsu$1"
