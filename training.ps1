# Trains overnight on Windows, then writes the results into README.md.
#
#   powershell -ExecutionPolicy Bypass -File training.ps1
#   powershell -ExecutionPolicy Bypass -File training.ps1 --steps 20000 --out_dir out/long
#
# Works in Windows PowerShell 5.1 and PowerShell 7, from any directory; paths are relative to this
# file's folder. Arguments are passed on to train.py and override the ones below. Write them as
# --flag value: PowerShell splits --flag=value where the value has a colon, as in C:\runs or cuda:1.
# On Linux and macOS PowerShell itself expands * and ~ in them.
# After a power cut, run the same command again: the run continues from its last checkpoint. The exit
# code is train.py's, or, after a run that went well, update_readme.py's.

$ErrorActionPreference = 'Stop'
$PSNativeCommandUseErrorActionPreference = $false   # PowerShell 7: exit codes are handled below

$trainArgs = @(
    '--preset', 'gpt2',
    '--input_file', 'data/input.txt',
    '--out_dir', 'out/gpt2',
    '--target_loss', '0.099999'
)
$trainArgs += $args
$onWindows = $env:OS -eq 'Windows_NT'   # PowerShell 5.1 has no $IsWindows

# The last --out_dir wins, in train.py as here.
$outDir = ''
for ($i = 0; $i -lt $trainArgs.Count; $i++) {
    if ($trainArgs[$i] -match '^--out[_-]dir=(.+)$') { $outDir = $Matches[1] }
    elseif ($trainArgs[$i] -match '^--out[_-]dir$' -and $i + 1 -lt $trainArgs.Count) {
        $outDir = "$($trainArgs[$i + 1])"
    }
}
# As text: Join-Path complains of a drive that is not there, and of a colon in a folder's name.
$results = "$outDir/results.json"
$isRooted = $outDir -match '^[\\/]' -or ($onWindows -and $outDir -match '^[A-Za-z]:')
if (-not $isRooted) { $results = "./$results" }

function Get-Stamp {
    # When results.json was last written; nothing where there is none.
    $file = Get-Item -LiteralPath $results -ErrorAction SilentlyContinue
    if ($file) { "$($file.LastWriteTimeUtc.Ticks)" } else { '' }
}

# Before 7.3, PowerShell drops empty arguments and inner quotes; in 5.1 an argument with a space and
# a backslash at its end swallows the next one. Quote them as C programs read them.
$passing = Get-Variable PSNativeCommandArgumentPassing -ValueOnly -ErrorAction SilentlyContinue
$swallows = $PSVersionTable.PSVersion.Major -lt 6
if (-not $passing -or "$passing" -eq 'Legacy') {
    $trainArgs = @(foreach ($argument in $trainArgs) {
        $quoted = "$argument" -replace '(\\*)"', '$1$1\"'
        if ($swallows -and $quoted -match '\s') { $quoted = $quoted -replace '(\\+)$', '$1$1' }
        if ($quoted -eq '') { '""' } else { $quoted }
    })
}

# Windows goes to sleep under a busy program unless the program asks it not to. That only helps, and
# must never stop the run.
$power = $null
if ($onWindows) {
    try {
        $power = Add-Type -Name Power -Namespace Training -PassThru -MemberDefinition `
            '[DllImport("kernel32.dll")] public static extern uint SetThreadExecutionState(uint flags);'
    }
    catch { Write-Warning "This machine may go to sleep during the run: $_" }
}
function Set-Awake([uint32]$state) {
    if ($power) {
        try { [void]$power::SetThreadExecutionState($state) }
        catch { Write-Warning "This machine may go to sleep during the run: $_" }
    }
}

function Find-Python {
    foreach ($candidate in '.venv/Scripts/python.exe', '.venv/bin/python') {
        if (Test-Path -LiteralPath $candidate) { return "$PSScriptRoot/$candidate" }
    }
    $names = if ($onWindows) { 'python', 'py' } else { 'python3', 'python' }
    foreach ($name in $names) {
        if (Get-Command $name -CommandType Application -ErrorAction SilentlyContinue) {
            $version = & $name --version   # under Windows `python` may be no more than an advertisement
            if ($LASTEXITCODE -eq 0 -and "$version" -match '^Python 3') { return $name }
        }
    }
}

$exitCode = 130   # of Ctrl-C, which leaves only `finally` to do
$failed = $false
Push-Location -LiteralPath $PSScriptRoot
try {
    # The editor of 5.1 takes what a program writes to stderr for an error.
    $ErrorActionPreference = 'Continue'
    $python = Find-Python
    if (-not $python) {
        Write-Output ('training.ps1: error: no Python was found: install Python 3.11 or newer from ' +
            'python.org, then the packages as README.md says')
        $exitCode = 2
    }
    else {
        Set-Awake 2147483649   # ES_CONTINUOUS | ES_SYSTEM_REQUIRED
        $before = Get-Stamp
        & $python train.py @trainArgs
        $exitCode = $LASTEXITCODE
        # What trained nothing, as --help does, leaves the results alone.
        if ($exitCode -eq 0 -and (Get-Stamp) -ne $before) {
            & $python update_readme.py --out_dir $outDir --readme README.md
            $exitCode = $LASTEXITCODE
        }
    }
}
catch {
    $failed = $true
    throw
}
finally {
    Set-Awake 2147483648   # ES_CONTINUOUS
    Pop-Location
    # Without this a script that Ctrl-C ended reports 0. Not in an open PowerShell, which it would close.
    if ($exitCode -eq 130 -and -not $failed -and -not $MyInvocation.Line) {
        try { $host.SetShouldExit(130) } catch { }
    }
}
exit $exitCode
